"""`import csflow`: models in this process, and the jobs as functions."""

import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, copy_some, run_score
from PIL import Image
from scored_output import NEW_MODEL, write_output

import csflow
from csflow.errors import ErrorCode, ExitStatus

TOLERANCE = 1e-5
"""Relative: the scoring job and a single image divide float32 sums differently."""


@pytest.fixture(scope="module")
def library_model(model: Path) -> csflow.Model:
    return csflow.load(model, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def photographs(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine cells: a batch, and one more."""
    return sorted(copy_some(cells / "defective", tmp_path_factory.mktemp("library") / "cells", 9).iterdir())


def test_importing_it_is_quick_and_brings_no_torch_no_ray_and_no_network() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import csflow; print(time.perf_counter() - start);"
        "print(*sorted(name for name in sys.modules if '.' not in name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    seconds, modules = done.stdout.splitlines()
    assert float(seconds) < 0.3
    assert not {"torch", "ray", "numpy", "pyarrow", "fsspec", "ssl"} & set(modules.split())


def test_the_public_names_are_those_of_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "library.md").read_text()
    documented = re.findall(r"auto(?:function|class|exception):: csflow\.(\w+)$", page, re.MULTILINE)
    assert sorted([*documented, "__version__"]) == csflow.__all__
    assert set(csflow.__all__) <= set(dir(csflow))
    for name in csflow.__all__:
        assert getattr(csflow, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        csflow.scores  # noqa: B018


def test_the_score_is_that_of_the_scoring_job(
    photographs: list[Path], model: Path, ray_cluster: object, tmp_path: Path
) -> None:
    arguments = ["--model", model, "--input", photographs[0].parent, "--output", tmp_path / "out"]
    arguments += ["--precision", "float32", "--false_positive_rate", "0.2", "--false_regions", "1"]
    assert run_score(*arguments) == ExitStatus.DONE
    scored = csflow.read_scores(tmp_path / "out").to_pandas().set_index("image_uri")
    judge = csflow.load(model, precision="float32", device="cpu", false_positive_rate=0.2, false_regions=1)
    many, one = judge.score(photographs), [judge.score(path) for path in photographs]
    for result in [*many, *one]:
        row = scored.loc[result.image_uri]
        for name in ("anomaly_score", "global_score", "local_score", "peak_y", "peak_x"):
            assert getattr(result, name) == pytest.approx(row[name], rel=TOLERANCE), name
        for name in ("p_value", "global_p_value", "local_p_value", "is_anomalous", "image_height"):
            assert getattr(result, name) == row[name], name
        shown = row["anomaly_map"].reshape(row["map_height"], row["map_width"])
        np.testing.assert_allclose(result.anomaly_map, shown, rtol=1e-3, atol=1e-4)
        assert result.regions is not None
        found = [pytest.approx(list(region.values()), rel=1e-3) for region in row["regions"]]
        assert list(map(list, result.regions)) == found
    assert any(result.regions for result in many)


def test_bytes_arrays_and_pillow_images_score_as_their_file(
    library_model: csflow.Model, photographs: list[Path]
) -> None:
    path = photographs[0]
    expected = library_model.score(path).anomaly_score
    with Image.open(path) as image:
        pixels = np.asarray(image)
        forms = [str(path), path.read_bytes(), pixels, pixels[:, :, None], image, image.convert("RGB")]
        forms += [np.asarray(image.convert("RGBA")), (pixels.astype(np.uint16) * 257), pixels / 255]
        for form in forms:
            assert library_model.score(form).anomaly_score == expected
    stacked = np.stack([np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in photographs])
    assert len(library_model.score(stacked)) == len(photographs)


def test_an_image_that_pillow_has_opened_is_turned_upright(
    library_model: csflow.Model, photographs: list[Path], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photographs[0]) as image:
        image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert (
            library_model.score(turned).anomaly_score
            == library_model.score(tmp_path / "turned.png").anomaly_score
        )


def test_an_image_on_a_web_server_scores_as_its_file(
    library_model: csflow.Model, photographs: list[Path]
) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(photographs[0].parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{photographs[0].name}"
        result = library_model.score(url)
    finally:
        server.shutdown()
    assert result.image_uri == url
    assert result.anomaly_score == library_model.score(photographs[0]).anomaly_score


def test_an_image_that_cannot_be_read_is_named_and_the_others_can_be_kept(
    library_model: csflow.Model, photographs: list[Path], tmp_path: Path
) -> None:
    gone = tmp_path / "gone.png"
    with pytest.raises(csflow.ImageError, match=re.escape(f"not_found: {gone}")):
        library_model.score(gone)
    some = [photographs[0], gone, b"no image", photographs[1]]
    with pytest.raises(csflow.ImageError, match=re.escape(str(gone))):
        library_model.score(some)
    first, missing, damaged, last = library_model.score(some, errors="return")
    assert isinstance(missing, csflow.ImageError)
    assert isinstance(damaged, csflow.ImageError)
    assert (missing.code, damaged.code) == (ErrorCode.NOT_FOUND, ErrorCode.UNSUPPORTED_FORMAT)
    assert isinstance(first, csflow.Result)
    assert isinstance(last, csflow.Result)
    assert (first.image_uri, last.image_uri) == (str(photographs[0]), str(photographs[1]))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (ROOT, "is a folder"),
        (3, "not int"),
        (np.zeros((4, 5, 7), np.uint8), r"shape \(4, 5, 7\)"),
        (np.zeros((4, 5, 3), np.float32), "float32"),
    ],
)
def test_what_is_no_image_is_refused(library_model: csflow.Model, given: object, complaint: str) -> None:
    with pytest.raises(csflow.WrongUse, match=complaint):
        library_model.score(given)  # type: ignore[call-overload]


def test_a_result_shows_itself(library_model: csflow.Model, photographs: list[Path]) -> None:
    result = library_model.score(photographs[0])
    with Image.open(photographs[0]) as image:
        assert result.image().size == result.overlay().size == image.size
        np.testing.assert_array_equal(np.asarray(result.image())[..., 0], np.asarray(image.convert("L")))
    assert result.overlay(side=64).size == (64, 64)
    assert not np.array_equal(result.overlay(), result.image())
    page = result._repr_html_()
    assert f"{result.anomaly_score:.4g}" in page
    assert "data:image/png;base64," in page
    assert library_model.model_id in repr(library_model)
    assert "anomaly_map" not in repr(result)


def test_a_model_that_can_flag_no_image_says_so(model: Path, recwarn: pytest.WarningsRecorder) -> None:
    csflow.load(model, false_positive_rate=0.2)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="--false_positive_rate 0.001 can flag no image"):
        csflow.load(model, false_positive_rate=0.001)


def test_a_wrong_setting_of_a_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(csflow.WrongUse, match="does not exist"):
        csflow.load(tmp_path / "no-model")
    with pytest.raises(csflow.WrongUse, match="between 0 and 1"):
        csflow.load(model, false_positive_rate=1.5)
    with pytest.raises(csflow.WrongUse, match="for GPUs"):
        csflow.load(model, precision="float16", device="cpu")


def test_scores_go_to_arrow_pandas_polars_and_duckdb(tmp_path: Path) -> None:
    read_scores = partial(csflow.read_scores, write_output(tmp_path / "out", range(17, 20)))
    read = partial(read_scores, model_id=NEW_MODEL)
    table = read()
    arrow = table.to_arrow()
    assert len(table) == len(arrow) == len(table.to_pandas()) == len(table.to_polars()) > 0
    assert table.to_duckdb().aggregate("count(*)").fetchall() == [(len(table),)]
    days = sorted(set(arrow["date"].to_pylist()))
    one, some = read(date=str(days[0])), read(date=(days[0], days[1]))
    assert set(one.to_arrow()["date"].to_pylist()) == {days[0]}
    assert set(some.to_duckdb().project("date").fetchall()) == {(days[0],), (days[1],)}
    few = read(columns=["image_uri", "p_value"])
    assert few.to_duckdb().columns == few.to_polars().columns == few.to_arrow().column_names
    with pytest.raises(csflow.WrongUse, match="several models"):
        read_scores()
    with pytest.raises(csflow.WrongUse, match="no column nothing"):
        read(columns=["nothing"])
    with pytest.raises(csflow.WrongUse, match="2026-11-27"):
        read(date="yesterday")


@pytest.mark.soak
def test_the_jobs_are_functions_over_the_same_settings(
    good_cells: Path, cells: Path, ray_cluster: object, tmp_path: Path
) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text("image-size: [128]\nhidden_channels: 16\nepochs: 5\n")
    trained = csflow.train(settings, input=[good_cells], output=tmp_path / "model", epochs=1)
    assert isinstance(trained, csflow.Model)
    images = [*copy_some(cells / "functional" / "test", tmp_path / "cells" / "good", 4).iterdir()]
    images += copy_some(cells / "defective", tmp_path / "cells" / "bad", 4).iterdir()
    record = csflow.score(model=tmp_path / "model", input=tmp_path / "cells", output=tmp_path / "out")
    assert (record.counts.scored, record.exit_status) == (len(images), ExitStatus.DONE)
    labels = tmp_path / "labels.csv"
    labels.write_text("image_uri,label\n" + "".join(f"{path},{int('bad' in str(path))}\n" for path in images))
    metrics = csflow.evaluate(scores=tmp_path / "out", labels=labels, bootstrap=100)
    assert 0 <= metrics["metrics"]["image_auroc"] <= 1
    with pytest.raises(csflow.WrongUse, match="--fit"):
        csflow.train(input=good_cells, output=tmp_path / "other", fit="squash")
    (tmp_path / "cells" / "damaged.png").write_bytes(b"no image")
    with pytest.raises(csflow.Incomplete, match="1 have permanent errors"):
        csflow.score(
            model=tmp_path / "model", input=tmp_path / "cells", output=tmp_path / "out", max_error_rate=0.01
        )
