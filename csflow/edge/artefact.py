"""Loads an exported model with ONNX Runtime or OpenVINO, and proves that it scores as the model did."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csflow.errors import Failed, WrongUse
from csflow.images import DecodedImage, decode
from csflow.preprocessing import DECODING_VERSIONS, Preprocessing
from csflow.scoring.rows import Judged, RegionRule

KEY = "csflow"
"""Name of the metadata in the artefact, a JSON object."""
FORMAT_VERSIONS = (1, 2, 3)
"""Version 2, of models whose calibration counts parts, has p-values that are no multiples of
1 / (heldout + 1); version 3 may have a mask."""

Outputs = dict[str, NDArray[Any]]


class SelfTestFailed(Failed):
    """The artefact does not give the score on this machine that the model gave where it was exported."""


class Artefact:
    """An exported model. Several threads may not use it at once."""

    def __init__(self, file: Path, threads: int = 1) -> None:
        """
        Args:
            file: .onnx, which needs the package onnxruntime or openvino, or .xml, which needs openvino.
            threads: number of processors to compute on.

        Raises:
            WrongUse: the file is no artefact that this version reads, or a package is missing.
        """
        if not file.is_file():
            raise WrongUse(f"{file} does not exist; csflow export writes it")
        self.runtime, self._run, text = _load(file, threads)
        if text is None:
            raise WrongUse(f"{file} was not written by csflow export")
        self.metadata: dict[str, Any] = json.loads(text)
        for key, known in (("format_version", FORMAT_VERSIONS), ("decoding_version", DECODING_VERSIONS)):
            if self.metadata[key] not in known:
                raise WrongUse(
                    f"{file} has {key} {self.metadata[key]}, this runtime {known[-1]}; export it anew"
                )
        self.model_id = str(self.metadata["model_id"])
        height, width = self.metadata["image_size"]
        self.preprocessing = Preprocessing(
            (height, width),
            self.metadata["fit"],
            self.metadata["interpolation"],
            self.metadata["decoding_version"],
            mask=self.metadata.get("mask"),  # which older artefacts do not have
        )
        regions = self.metadata.get("regions")  # which older artefacts do not have
        self.region_rule = regions and RegionRule(
            regions["threshold"],
            np.array(regions["heldout_peaks"]),
            np.array(weights) if (weights := regions.get("weights")) else None,
        )

    def check(self) -> None:
        """Scores the self-test image. Raises SelfTestFailed if its score or map is another than it was."""
        expected = self.metadata["self_test"]
        judged = self.judge(decode(base64.b64decode(expected["image"]), self.preprocessing))
        found = {
            "anomaly_score": float(judged.anomaly_score_B[0]),
            "map_maximum": float(judged.anomaly_map_BHW.max()),
        }
        for name, value in found.items():
            if not abs(value - expected[name]) <= expected["tolerance"] * abs(expected[name]):
                raise SelfTestFailed(
                    f"self-test failed: {name} {value:.7g} in place of {expected[name]:.7g} with "
                    f"{self.runtime}; install the versions of Pillow and of the runtime with which it was "
                    "exported, or export it anew"
                )

    def judge(self, decoded: DecodedImage) -> Judged:
        """Score, p-values, verdict and map of one image."""
        outputs = self._run(np.ascontiguousarray(decoded.pixels_HWC[None]))
        p_value_B = self._p_value(outputs["p_value"])
        has_local = "local_score" in outputs
        return Judged(
            outputs["anomaly_score"].astype(np.float64),
            p_value_B,
            outputs["is_anomalous"].astype(np.bool_),
            outputs["global_score"].astype(np.float64),
            self._p_value(outputs["global_p_value"]) if "global_p_value" in outputs else p_value_B,
            outputs["local_score"].astype(np.float64) if has_local else None,
            self._p_value(outputs["local_p_value"]) if has_local else None,
            outputs["scale_scores"],
            outputs["anomaly_map"],
        )

    def _p_value(self, value_B: NDArray[np.float32]) -> NDArray[np.float64]:
        """The fraction in float64 that the graph gives in float32: its denominator is known."""
        of_all = self.metadata.get("p_value_steps", self.metadata["heldout"] + 1)
        if of_all is None:
            return value_B.astype(np.float64)
        fraction_B: NDArray[np.float64] = np.rint(value_B.astype(np.float64) * of_all) / of_all
        return fraction_B


def _load(file: Path, threads: int) -> tuple[str, Callable[[NDArray[np.uint8]], Outputs], str | None]:
    """The runtime's name and version, the function that runs the graph, and the metadata."""
    if file.suffix == ".onnx":
        try:
            import onnxruntime
        except ImportError:
            return _with_openvino(file, threads)
        return _with_onnxruntime(onnxruntime, file, threads)
    if file.suffix == ".xml":
        return _with_openvino(file, threads)
    raise WrongUse(f"{file} is neither .onnx nor .xml")


def _with_onnxruntime(
    onnxruntime: Any, file: Path, threads: int
) -> tuple[str, Callable[[NDArray[np.uint8]], Outputs], str | None]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    name = session.get_inputs()[0].name

    def run(image_BHWC: NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, session.run(names, {name: image_BHWC}), strict=True))

    metadata = session.get_modelmeta().custom_metadata_map.get(KEY)
    return f"onnxruntime {onnxruntime.__version__}", run, metadata


def _with_openvino(
    file: Path, threads: int
) -> tuple[str, Callable[[NDArray[np.uint8]], Outputs], str | None]:
    try:
        import openvino
    except ImportError:
        needed = "onnxruntime or openvino" if file.suffix == ".onnx" else "openvino"
        raise WrongUse(f"{file} needs the package {needed}; pip install it") from None
    network = openvino.Core().read_model(file)
    places = [[KEY], ["framework", KEY]]  # of an .xml, and of an .onnx
    metadata = next((str(network.get_rt_info(p).value) for p in places if network.has_rt_info(p)), None)
    _, *shape = network.input(0).partial_shape
    network.reshape([1, *(size.get_length() for size in shape)])  # a fixed size computes faster
    # Else OpenVINO rounds to bfloat16 where the processor multiplies it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    names = [output.get_any_name() for output in compiled.outputs]

    def run(image_BHWC: NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, map(np.array, request.infer([image_BHWC]).to_tuple()), strict=True))

    return f"openvino {openvino.__version__}", run, metadata
