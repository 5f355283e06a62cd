"""Exported models: the artefact, its runtime without PyTorch, and the one number of all forms of a model."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
from conftest import ROOT, copy_some
from numpy.typing import NDArray
from openvino import opset13
from pages import Block, run_python

import csflow
from csflow.calibration import p_values
from csflow.config import parse
from csflow.edge import command
from csflow.edge.artefact import Artefact, SelfTestFailed
from csflow.edge.command import main
from csflow.errors import ExitStatus, WrongUse
from csflow.exporting.config import ExportConfig
from csflow.exporting.graph import Judge, _rounded_down
from csflow.exporting.int8 import Labelled, Loss, quantised
from csflow.exporting.job import _p_value_steps, export
from csflow.images import decode
from csflow.inputs.listing import IMAGE_SUFFIXES, list_images
from csflow.model_directory import Calibration, Model, load_model
from csflow.output.schemas import ERRORS, SCORES
from csflow.scoring.rows import Judged
from csflow.storage import Location

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
RATE = 0.2
TOLERANCE = 2e-5
"""Largest relative difference of a score in float32, whatever computes it."""


@pytest.fixture(scope="module")
def photographs(cells: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `demo/cells` of a small demo: eight cells with a defect, eight without, and their labels."""
    demo = tmp_path_factory.mktemp("notebook") / "demo"
    demo.mkdir()
    (demo / "model").symlink_to(model)
    (demo / "cells" / "functional").mkdir(parents=True)
    rows = ["image_uri,label"]
    for label, folder in enumerate(("functional/test", "defective")):
        copied = copy_some(cells / folder, demo / "cells" / folder, 8)
        rows += [f"{folder}/{path.name},{label}" for path in copied.iterdir()]
    (demo / "cells" / "labels.csv").write_text("\n".join(rows))
    return demo / "cells"


def images(photographs: Path) -> list[Path]:
    return sorted(photographs.rglob("*.png"))


@pytest.fixture(scope="module")
def notebook(photographs: Path) -> tuple[Path, dict[str, Any], list[Any]]:
    """The notebook's folder after all cells have run, its variables, and what each cell shows."""
    folder = photographs.parent.parent
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    blocks = [Block(NOTEBOOK, n, "", "python", frozenset(), code) for n, code in enumerate(codes)]
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        return folder, names, [run_python(block, names) for block in blocks]


@pytest.fixture(scope="module")
def artefacts(notebook: tuple[Path, dict[str, Any], list[Any]]) -> dict[str, Path]:
    """The model as ONNX and as OpenVINO, and the runtime in one file, as the notebook has exported them."""
    folder, names, _ = notebook
    return {to: folder / names[to] for to in ("onnx", "openvino")} | {"runtime": folder / "csflow-edge.pyz"}


@pytest.fixture(scope="module")
def directory(model: Path) -> Model:
    return load_model(Location(str(model)))


def test_every_form_of_a_model_gives_the_same_score_p_value_and_verdict(
    artefacts: dict[str, Path], photographs: Path, directory: Model, model: Path
) -> None:
    forms = [Artefact(artefacts["onnx"]), Artefact(artefacts["openvino"])]
    scoring_form = csflow.load(model, precision="float32", device="cpu", false_positive_rate=RATE)
    heldout = directory.calibration
    verdicts = set()
    for path in images(photographs):
        decoded = decode(path.read_bytes(), directory.detector.architecture.preprocessing)
        with torch.inference_mode():
            exact = directory.detector(torch.from_numpy(decoded.pixels_HWC)[None])
        score = exact.anomaly_score_B.item()
        ties = np.abs(heldout.anomaly_score - score) <= TOLERANCE * score
        result = scoring_form.score(path)
        assert result.anomaly_score == pytest.approx(score, rel=TOLERANCE)
        for judged in (form.judge(decoded) for form in forms):
            assert judged.anomaly_score_B[0] == pytest.approx(score, rel=TOLERANCE)
            assert judged.global_score_B[0] == pytest.approx(result.global_score, rel=TOLERANCE)
            assert judged.local_score_B is not None
            assert judged.local_score_B[0] == pytest.approx(result.local_score, rel=TOLERANCE)
            np.testing.assert_allclose(
                judged.anomaly_map_BHW[0], exact.anomaly_map_BHW[0], rtol=1e-3, atol=1e-4
            )
            np.testing.assert_allclose(judged.scale_scores_BS, exact.scale_scores_BS, rtol=1e-4)
            # The graph's p-value is that of the graph's score; at a tie another form's may differ.
            assert judged.p_value_B[0] == p_values(judged.anomaly_score_B, heldout.anomaly_score)[0]
            assert judged.is_anomalous_B[0] == (judged.p_value_B[0] <= RATE)
            if not ties.any():
                assert judged.p_value_B[0] == result.p_value
                assert judged.is_anomalous_B[0] == result.is_anomalous
        verdicts.add(result.is_anomalous)
    assert verdicts == {True, False}


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    notebook: tuple[Path, dict[str, Any], list[Any]],
) -> None:
    _, names, shown = notebook
    assert len(shown) == 10
    assert shown[-2] < TOLERANCE  # the exported model's scores are the library's
    assert shown[-1] == names["metrics"]["metrics"]["image_auroc"] > 0.5


def test_an_artefact_says_what_it_is(artefacts: dict[str, Path], directory: Model) -> None:
    for to in ("onnx", "openvino"):
        artefact = Artefact(artefacts[to])
        artefact.check()
        assert artefact.model_id == directory.model_id
        assert artefact.metadata["precision"] == "float32"
        assert artefact.metadata["opset"] == 20
        assert artefact.metadata["false_positive_rate"] == RATE
        assert artefact.preprocessing == directory.detector.architecture.preprocessing
        assert artefact.metadata["map_threshold"] == directory.calibration.map_threshold(RATE)


def test_an_artefact_takes_any_number_of_images(artefacts: dict[str, Path], photographs: Path) -> None:
    import onnxruntime

    artefact = Artefact(artefacts["onnx"])
    pixels = [decode(p.read_bytes(), artefact.preprocessing) for p in images(photographs)[:3]]
    session = onnxruntime.InferenceSession(artefacts["onnx"], providers=["CPUExecutionProvider"])
    [scores] = session.run(["anomaly_score"], {"image": np.stack([image.pixels_HWC for image in pixels])})
    for image, score in zip(pixels, scores, strict=True):
        assert artefact.judge(image).anomaly_score_B[0] == pytest.approx(score, rel=TOLERANCE)


def test_an_artefact_that_scores_otherwise_is_refused(artefacts: dict[str, Path]) -> None:
    artefact = Artefact(artefacts["onnx"])
    artefact.metadata["self_test"]["anomaly_score"] *= 1.001
    with pytest.raises(SelfTestFailed, match="anomaly_score"):
        artefact.check()


def test_the_runtime_in_one_file_writes_the_rows_of_the_scoring_job_without_csflow(
    artefacts: dict[str, Path], photographs: Path, directory: Model, model: Path, tmp_path: Path
) -> None:
    line = tmp_path / "images"
    shutil.copytree(photographs, line)
    (line / "damaged.png").write_bytes(b"no image")
    # Nothing but what the runtime may need can be imported; csflow comes from the file.
    blocked = (
        "import sys, runpy\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'ray', 'timm', 'fsspec', 'pydantic', 'openvino'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = [artefacts["onnx"], "--input", line, "--output", tmp_path / "out"]
    arguments = [sys.executable, "-c", blocked, str(artefacts["runtime"]), *map(str, words)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = {entry.pop("image_uri"): entry for entry in map(json.loads, done.stdout.splitlines())}
    assert "unsupported_format" in said.pop(str(line / "damaged.png"))["error"]
    scores = csflow.read_scores(tmp_path / "out")
    assert scores.model_id == directory.model_id
    frame = scores.to_pandas().set_index("image_uri")
    assert {uri: row["anomaly_score"] for uri, row in said.items()} == dict(frame.anomaly_score)
    for result in csflow.load(model, precision="float32").score(images(photographs)):
        of_line = frame.regions[str(line / Path(result.image_uri).relative_to(photographs))]
        assert list(map(list, result.regions)) == [
            pytest.approx(list(region.values()), rel=1e-3) for region in of_line
        ]
    assert frame.regions.map(len).any()
    [file] = (tmp_path / "out").glob("scores/*/*/*.parquet")
    assert ds.dataset(file).schema.equals(SCORES)
    [errors] = (tmp_path / "out").glob("errors/*/*/*.parquet")
    assert ds.dataset(errors).schema.equals(ERRORS)
    listed = [row for batch in list_images([str(line)], {}) for row in batch.to_pylist()]
    versions = {row["image_uri"]: row["image_version"] for row in listed}
    assert dict(frame.image_version) == {uri: versions[uri] for uri in frame.index}
    assert command.IMAGE_SUFFIXES == IMAGE_SUFFIXES
    again = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 2


def test_a_watched_folder_gives_a_line_per_image_once_it_is_whole(
    photographs: Path,
    artefacts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, *_ = images(photographs)
    line = tmp_path / "line"
    line.mkdir()
    (line / "a.png").write_bytes(first.read_bytes())
    half, looks = second.read_bytes(), 0

    def camera() -> None:
        """What the camera does between two looks: it writes a file in two parts, then the shift ends."""
        nonlocal looks
        looks += 1
        if looks == 1:
            (line / "b.png").write_bytes(half[: len(half) // 2])
        elif looks == 2:
            (line / "b.png").write_bytes(half)
        elif looks == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "pause", camera)
    with pytest.raises(SystemExit) as ended:
        main([str(artefacts["openvino"]), "--input", str(line), "--output", str(tmp_path / "out"), "--watch"])
    assert ended.value.code == ExitStatus.STOPPED
    said = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [Path(entry["image_uri"]).name for entry in said] == ["a.png", "b.png"]
    assert not [entry for entry in said if "error" in entry]
    assert len(csflow.read_scores(tmp_path / "out")) == 2


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[list[str]]:
    yield ["--input", str(tmp_path), "--output", str(tmp_path / "out")]


def test_what_is_no_artefact_is_refused_in_one_line(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    for file, complaint in (("none.onnx", "does not exist"), ("model.bin", "neither .onnx nor .xml")):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / file), *command_line])
        assert ended.value.code == ExitStatus.WRONG_USE
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--to", "onnx", "--output", "cells.xml"], "must end with .onnx"),
        (["--to", "openvino", "--output", "cells.onnx"], "must end with .xml"),
        (["--to", "onnx", "--output", "cells.onnx", "--self_test", "gone.png"], "gone.png: not_found"),
        (["--to", "openvino", "--output", "cells", "--int8"], "needs --labels"),
        (["--to", "onnx", "openvino", "--output", "cells", "--int8"], "give --to openvino alone"),
        (["--to", "onnx", "--output", "cells", "--labels", "few.csv"], "--labels is for --int8"),
    ],
)
def test_a_wrong_export_is_refused_before_any_work(
    words: list[str], complaint: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongUse, match=complaint):
        export(parse(ExportConfig, None, [str(model), *words]))
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_an_artefact_in_int8_has_scores_p_values_and_an_id_of_its_own(
    cells: Path, model: Path, directory: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [sorted((cells / folder).iterdir())[:10] for folder in ("functional/test", "defective")]
    rows = [f"{path},{label}" for label, paths in enumerate(chosen) for path in paths]
    (tmp_path / "labels.csv").write_text("\n".join(["image_uri,label", *rows]))
    words = f"{model} --to openvino --output {tmp_path}/cells --false_positive_rate {RATE} --int8"
    export(
        parse(ExportConfig, None, [*words.split(), "--labels", f"{tmp_path}/labels.csv", "--max_loss", "0.9"])
    )
    artefact = Artefact(tmp_path / "cells.xml")
    artefact.check()
    loss = artefact.metadata["int8"]
    assert artefact.metadata["precision"] == "int8"
    assert loss["quantised_from"] == directory.model_id != artefact.model_id
    assert loss["quantised"] == loss["convolutions"] > 100
    assert f"AUROC {loss['image_auroc']:.4f} on 20 labelled images" in capsys.readouterr().out
    preprocessing = directory.detector.architecture.preprocessing

    def judged(paths: Sequence[Path]) -> list[Judged]:
        return [artefact.judge(decode(path.read_bytes(), preprocessing)) for path in paths]

    def scores(of_images: list[Judged]) -> NDArray[np.float64]:
        return np.array([of_image.anomaly_score_B[0] for of_image in of_images])

    heldout = scores(judged([Path(uri) for uri in directory.calibration.table["image_uri"].to_pylist()]))
    assert np.abs(heldout / directory.calibration.anomaly_score - 1).max() > 1e-4
    labelled = judged([*chosen[0], *chosen[1]])
    p_value_N = p_values(scores(labelled), heldout)
    assert [of_image.p_value_B[0] for of_image in labelled] == pytest.approx(p_value_N)
    assert [of_image.is_anomalous_B[0] for of_image in labelled] == (p_value_N <= RATE).tolist()


def first_convolution_sees_more_than_8_bits() -> openvino.Model:
    """Three convolutions. What tells images apart is lost in a first one of 8 bits, and in no other."""
    image_BHWC = opset13.parameter([1, 8, 8, 3], np.uint8)
    image_BCHW = opset13.transpose(opset13.convert(image_BHWC, np.float32), np.array([0, 3, 1, 2]))
    value = opset13.power(image_BCHW, np.float32(2))  # up to 65,025, of which images differ in 0 to 100
    one = np.full((3, 3, 1, 1), 1 / 3, np.float32)
    for most in (150, 150, 150):
        value = opset13.convolution(value, one, [1, 1], [0, 0], [0, 0], [1, 1])
        value = opset13.clamp(value, 0, most)
    score_B = opset13.reduce_mean(value, np.array([1, 2, 3]))
    score_B.output(0).set_names({"anomaly_score"})
    return openvino.Model([opset13.result(score_B)], [image_BHWC])


def of_levels(levels: Sequence[int]) -> Labelled:
    """Images of one level and a white row, the darker half normal."""
    images = [np.full((1, 8, 8, 3), level, np.uint8) for level in levels]
    for image_1HWC in images:
        image_1HWC[:, 0] = 255
    return Labelled(images, [place >= len(levels) / 2 for place in range(len(levels))])


def test_as_many_of_the_last_convolutions_are_in_int8_as_the_loss_allows() -> None:
    network, labelled = first_convolution_sees_more_than_8_bits(), of_levels(range(10))
    tried: list[Loss] = []
    found, loss = quantised(network, labelled, 0.01, tried.append)
    assert [of_network.quantised for of_network in tried] == [3, 1, 2]
    assert (loss.quantised, loss.convolutions) == (2, 3)
    assert tried[0].image_auroc < 0.9 and loss.image_auroc == loss.float32_image_auroc == 1
    assert labelled.auroc(labelled.scores(found)) == 1
    assert loss.interval == (0, 0)
    assert (tried[0].of_auroc, tried[0].interval) == (0.5, (0.5, 0.5))  # all images have one score
    convolutions = [op for op in found.get_ordered_ops() if op.get_type_name() == "Convolution"]
    inputs = [op.input_value(0).get_node().get_type_name() for op in convolutions]
    assert [name == "FakeQuantize" for name in inputs] == [False, True, True]
    assert quantised(network, labelled, 0.9, tried.append)[1].quantised == 3


def test_int8_that_loses_too_much_is_refused() -> None:
    with pytest.raises(WrongUse, match=r"more than --max_loss -1 \(AUROC .*1 of 3 .*; export in float32"):
        quantised(first_convolution_sees_more_than_8_bits(), of_levels(range(10)), -1, lambda tried: None)


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 3)])
def test_verdict_and_p_value_of_a_graph_are_those_of_the_fraction(sizes: tuple[int, ...]) -> None:
    """Whether each held-out image shows another part, or some show one: then fractions have more steps."""
    scores = np.linspace(0.5, 2, 240)
    parts = [str(number) for number in range(240) for _ in range(sizes[number % len(sizes)])][:240]
    part = {} if sizes == (1,) else {"part": parts}
    table = pa.table({"image_uri": parts, "image_version": parts, "anomaly_score": scores} | part)
    heldout = Calibration.of(table)
    for rate in (0.001, 0.01, 0.05, 0.1, 0.3):
        graph = Judge(heldout, rate)
        p_value_K = p_values(np.append(9, scores[::-1]), scores, heldout.weights)
        assert graph.most_at_least == (p_value_K <= rate).sum() - 1
        steps = _p_value_steps(heldout)
        assert steps is not None
        rounded_K = graph.get_buffer("p_value_anomaly_K").numpy().astype(np.float64)
        np.testing.assert_allclose(np.rint(rounded_K * steps) / steps, p_value_K, rtol=1e-9)


def test_held_out_scores_are_rounded_so_that_comparisons_stay() -> None:
    scores = np.array([1.0, 1 + 1e-12, 1 - 1e-12, 0.1, np.pi])
    rounded = _rounded_down(scores)
    beside = [np.nextafter(rounded, np.float32(end)) for end in (0, 9)]
    for score in np.concatenate([rounded, *beside]):
        assert (rounded >= score).sum() == (scores >= np.float64(score)).sum()
