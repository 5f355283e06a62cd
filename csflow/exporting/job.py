"""`csflow export`: writes a model as one artefact that ONNX Runtime or OpenVINO runs, and proves it."""

import base64
import importlib.util
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csflow import __version__
from csflow.console import warn
from csflow.edge.artefact import FORMAT_VERSIONS, KEY, Artefact
from csflow.errors import ExitStatus, ImageError, WrongUse
from csflow.exporting.bundle import write_runtime
from csflow.exporting.config import ExportConfig
from csflow.exporting.graph import OPSET, onnx_program
from csflow.images import decode
from csflow.inputs.reading import ImageReader
from csflow.library.sources import Source, open_store
from csflow.model_directory import Calibration, Model, load_model
from csflow.scoring.rows import RegionRule
from csflow.storage import Location

TOLERANCE = 1e-4
"""Largest relative difference of a score from PyTorch's in float32; seen: 2e-6."""
READ_DEADLINE_S = 10.0
MAX_SELF_TEST_BYTES = 4 << 20
MOST_STEPS = 1 << 22
"""Largest denominator of p-values that float32 holds with a bit to spare."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export(config: ExportConfig) -> ExitStatus:
    """Writes the artefact, runs it, and compares it with the model.

    Raises:
        WrongUse: a setting is wrong, no self-test image can be read, or a package is missing.
        SelfTestFailed: the artefact does not give the model's score.
    """
    outputs = [Location(file, config.storage_options) for file in config.files()]
    _require_packages()
    outputs[0].parent.check_writable()
    model = load_model(Location(config.model, config.storage_options))
    if model.detector.architecture.tiling:
        raise WrongUse(
            f"--model {config.model} sees images in tiles, and what is exported sees them as a whole; export "
            "a model that was trained without --tile"
        )
    if model.calibration.groups:
        warn("the p-values by group of this model are not exported: at the edge all images are one group")
    metadata = _metadata(config, model, _self_test_image(config, model))
    program = onnx_program(model.detector, model.calibration, config.false_positive_rate)
    for output in outputs:
        _write(program, metadata, output)
        print(f"model {model.model_id} written to {output}: float32, opset {OPSET} of ONNX, self-test passed")
    if config.runtime is not None:
        write_runtime(Path(config.runtime))
    return ExitStatus.DONE


def _require_packages() -> None:
    """Raises WrongUse if a package is missing that exports or checks the artefact."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise WrongUse(f"csflow export needs {', '.join(missing)}; pip install 'csflow[export]'")


def _metadata(config: ExportConfig, model: Model, self_test: bytes) -> dict[str, Any]:
    """What travels with the graph."""
    preprocessing = model.detector.architecture.preprocessing
    decoded = decode(self_test, preprocessing)
    with torch.inference_mode():
        scores = model.detector(torch.from_numpy(decoded.pixels_HWC)[None])
    rule = RegionRule.of(model.calibration, config.false_regions)
    return {
        "format_version": FORMAT_VERSIONS[2 if preprocessing.mask else model.calibration.weights is not None],
        "csflow": __version__,
        "model_id": model.model_id,
        "decoding_version": preprocessing.decoding_version,
        "image_size": list(preprocessing.image_size),
        "fit": preprocessing.fit,
        "interpolation": preprocessing.interpolation,
        "mask": preprocessing.mask,
        "precision": "float32",
        "opset": OPSET,
        "heldout": model.calibration.size,
        "p_value_steps": _p_value_steps(model.calibration),
        "false_positive_rate": config.false_positive_rate,
        "map_threshold": model.calibration.map_threshold(config.false_positive_rate),
        "regions": rule
        and {
            "threshold": rule.threshold,
            "heldout_peaks": rule.heldout_peak_N.tolist(),
            "weights": None if rule.weights is None else rule.weights.tolist(),
        },
        "self_test": {
            "image": base64.b64encode(self_test).decode(),
            "anomaly_score": scores.anomaly_score_B.item(),
            "map_maximum": scores.anomaly_map_BHW.max().item(),
            "tolerance": TOLERANCE,
        },
    }


def _p_value_steps(calibration: Calibration) -> int | None:
    """The denominator that all p-values have in common; None if float32 cannot tell its fractions apart."""
    shares = [] if calibration.weights is None else np.rint(1 / calibration.weights).astype(int).tolist()
    steps = math.lcm(*shares) * (calibration.size + 1)
    return steps if steps < MOST_STEPS else None


def _self_test_image(config: ExportConfig, model: Model) -> bytes:
    """The bytes of an image that can be decoded. Raises WrongUse if there is none."""
    if config.self_test is not None:
        try:
            data = Source(config.self_test, open_store(config.storage_options)).read()
            decode(data)
        except ImageError as error:
            raise WrongUse(f"--self_test {config.self_test}: {error}") from None
        if len(data) > MAX_SELF_TEST_BYTES:
            raise WrongUse(f"--self_test {config.self_test} has {len(data)} bytes; give one of at most 4 MB")
        return data
    table = model.calibration.table
    order = np.argsort(model.calibration.anomaly_score)
    reader = ImageReader(config.storage_options, READ_DEADLINE_S)
    # From the middle outwards: an extreme image is no typical one, and its score has the largest error.
    for index in sorted(range(len(order)), key=lambda place: abs(place - len(order) // 2))[:5]:
        row = table.slice(int(order[index]), 1).to_pylist()[0]
        try:
            data = reader.read(row["image_uri"], row["image_version"])
        except ImageError:
            continue
        if len(data) <= MAX_SELF_TEST_BYTES:
            return data
    raise WrongUse(
        f"no held-out image of {config.model} can be read where it was, or is at most 4 MB; "
        "give an image with --self_test"
    )


def _write(program: "torch.onnx.ONNXProgram", metadata: dict[str, Any], output: Location) -> None:
    """Writes and checks the artefact locally, then puts it where it is to be."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / output.name
        _save(program, local, json.dumps(metadata))
        Artefact(local).check()
        for file in sorted(Path(folder).iterdir()):  # the .bin before the .xml
            (output.parent / file.name).write(file.read_bytes())


def _save(program: "torch.onnx.ONNXProgram", file: Path, metadata: str) -> None:
    program.model.metadata_props[KEY] = metadata
    program.model.producer_name, program.model.producer_version = "csflow", __version__
    data = program.model_proto.SerializeToString()
    if file.suffix == ".onnx":
        file.write_bytes(data)
        return
    import openvino

    # Converted, and not only read, so that norms are folded here, and not wherever the artefact is loaded.
    network = openvino.convert_model(io.BytesIO(data))
    network.set_rt_info(metadata, [KEY])
    openvino.save_model(network, file, compress_to_fp16=False)
