"""`csflow export`: writes a model as one artefact that ONNX Runtime or OpenVINO runs, and proves it."""

import base64
import importlib.util
import io
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from csflow import __version__
from csflow.console import say, warn
from csflow.edge.artefact import FORMAT_VERSIONS, KEY, Artefact
from csflow.errors import ExitStatus, ImageError, WrongUse
from csflow.evaluation.labels import read_labels
from csflow.exporting.bundle import write_runtime
from csflow.exporting.config import ExportConfig
from csflow.exporting.graph import (
    OPSET,
    Judge,
    JudgingDetector,
    ScoringDetector,
    image_program,
    judge_program,
)
from csflow.images import decode
from csflow.inputs.reading import ImageReader
from csflow.library.sources import Source, open_store
from csflow.model_directory import Calibration, Model, load_model, read_config
from csflow.preprocessing import Preprocessing
from csflow.scoring.rows import RegionRule
from csflow.storage import Location

if TYPE_CHECKING:
    import openvino

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
    _require_packages(config.int8)
    outputs[0].parent.check_writable()
    model = load_model(Location(config.model, config.storage_options))
    if model.detector.architecture.tiling:
        raise WrongUse(
            f"--model {config.model} sees images in tiles, and what is exported sees them as a whole; export "
            "a model that was trained without --tile"
        )
    if model.calibration.groups:
        warn("the p-values by group of this model are not exported: at the edge all images are one group")
    self_test = _self_test_image(config, model)
    if config.int8:
        if read_config(Location(config.model, config.storage_options))["data"].get("calibration_folds"):
            raise WrongUse(
                f"--int8 scores held-out images anew, and {config.model} (--calibration cross) was trained "
                "on its own; give it others with csflow recalibrate"
            )
        _export_int8(config, model, self_test, outputs[0])
    else:
        _export_float32(config, model, self_test, outputs)
    if config.runtime is not None:
        write_runtime(Path(config.runtime))
    return ExitStatus.DONE


def _export_float32(
    config: ExportConfig, model: Model, self_test: bytes, outputs: Sequence[Location]
) -> None:
    architecture, calibration = model.detector.architecture, model.calibration
    judging = JudgingDetector(_scoring(model), Judge(calibration, config.false_positive_rate))
    program = image_program(judging, architecture.image_size)
    pixels_HWC = decode(self_test, architecture.preprocessing).pixels_HWC
    with torch.inference_mode():
        scores = model.detector(torch.from_numpy(pixels_HWC)[None])
    metadata = _metadata(config, model.model_id, architecture.preprocessing, calibration)
    metadata |= {"precision": "float32"} | _self_test(
        self_test, scores.anomaly_score_B.numpy(), scores.anomaly_map_BHW.numpy(), TOLERANCE
    )
    for output in outputs:
        _write(program if output.name.endswith(".onnx") else _network(program), metadata, output)
        print(f"model {model.model_id} written to {output}: float32, opset {OPSET} of ONNX, self-test passed")


def _export_int8(config: ExportConfig, model: Model, self_test: bytes, output: Location) -> None:
    from csflow.exporting import int8  # imported here, since NNCF is an extra, and takes seconds

    architecture, options = model.detector.architecture, config.storage_options
    assert config.labels is not None  # the settings have been checked
    labels = read_labels(Location(config.labels, options))
    labelled = int8.Labelled.read(labels, options, architecture.preprocessing)
    say(f"quantising by {len(labelled.image_N1HWC)} labelled images; this takes minutes")
    scoring = _network(image_program(_scoring(model), architecture.image_size))
    scoring, loss = int8.quantised(scoring, labelled, config.max_loss, lambda tried: say(f"tried: {tried}"))
    print(loss)
    if loss.interval[1] > config.max_loss:
        warn(
            f"with {loss.labelled_images} labelled images, the true loss may be as large as "
            f"{loss.interval[1]:.3f}; label more to know it better"
        )
    calibration = int8.calibrated(scoring, model.calibration, architecture, options)
    judge = Judge(calibration, config.false_positive_rate)
    network = int8.joined(scoring, _network(judge_program(judge)))
    model_id = int8.model_id(model.model_id, network)
    pixels_HWC = decode(self_test, architecture.preprocessing).pixels_HWC
    found = int8.compiled(network).infer([pixels_HWC[None]])
    metadata = _metadata(config, model_id, architecture.preprocessing, calibration)
    metadata |= {
        "precision": "int8",
        "int8": asdict(loss) | {"quantised_from": model.model_id},
    } | _self_test(self_test, found["anomaly_score"], found["anomaly_map"], int8.TOLERANCE)
    _write(network, metadata, output)
    print(
        f"model {model_id} written to {output}: INT8 of model {model.model_id}, with scores of its own, "
        "self-test passed"
    )


def _scoring(model: Model) -> ScoringDetector:
    return ScoringDetector(model.detector, model.calibration.local_score is not None)


def _require_packages(int8: bool) -> None:
    """Raises WrongUse if a package is missing that exports or checks the artefact."""
    extra, packages = ("int8", (*PACKAGES, "nncf")) if int8 else ("export", PACKAGES)
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise WrongUse(f"csflow export needs {', '.join(missing)}; pip install 'csflow[{extra}]'")


def _metadata(
    config: ExportConfig, model_id: str, preprocessing: Preprocessing, calibration: Calibration
) -> dict[str, Any]:
    """What travels with the graph, without its precision and self-test."""
    rule = RegionRule.of(calibration, config.false_regions)
    return {
        "format_version": FORMAT_VERSIONS[2 if preprocessing.mask else calibration.weights is not None],
        "csflow": __version__,
        "model_id": model_id,
        "decoding_version": preprocessing.decoding_version,
        "image_size": list(preprocessing.image_size),
        "fit": preprocessing.fit,
        "interpolation": preprocessing.interpolation,
        "mask": preprocessing.mask,
        "opset": OPSET,
        "heldout": calibration.size,
        "p_value_steps": _p_value_steps(calibration),
        "false_positive_rate": config.false_positive_rate,
        "map_threshold": calibration.map_threshold(config.false_positive_rate),
        "regions": rule
        and {
            "threshold": rule.threshold,
            "heldout_peaks": rule.heldout_peak_N.tolist(),
            "weights": None if rule.weights is None else rule.weights.tolist(),
        },
    }


def _self_test(
    image: bytes, score_B: NDArray[np.float32], map_BHW: NDArray[np.float32], tolerance: float
) -> dict[str, Any]:
    return {
        "self_test": {
            "image": base64.b64encode(image).decode(),
            "anomaly_score": float(score_B[0]),
            "map_maximum": float(map_BHW.max()),
            "tolerance": tolerance,
        }
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


def _network(program: "torch.onnx.ONNXProgram") -> "openvino.Model":
    """The graph for OpenVINO, converted and not only read: so norms are folded here, not at each start."""
    import openvino

    return openvino.convert_model(io.BytesIO(program.model_proto.SerializeToString()))


def _write(
    graph: "torch.onnx.ONNXProgram | openvino.Model", metadata: dict[str, Any], output: Location
) -> None:
    """Writes and checks the artefact locally, then puts it where it is to be."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / output.name
        _save(graph, local, json.dumps(metadata))
        Artefact(local).check()
        for file in sorted(Path(folder).iterdir()):  # the .bin before the .xml
            (output.parent / file.name).write(file.read_bytes())


def _save(graph: "torch.onnx.ONNXProgram | openvino.Model", file: Path, metadata: str) -> None:
    if isinstance(graph, torch.onnx.ONNXProgram):
        graph.model.metadata_props[KEY] = metadata
        graph.model.producer_name, graph.model.producer_version = "csflow", __version__
        file.write_bytes(graph.model_proto.SerializeToString())
        return
    import openvino

    graph.set_rt_info(metadata, [KEY])
    openvino.save_model(graph, file, compress_to_fp16=False)
