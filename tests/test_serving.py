"""The deployment for Ray Serve that docs/howto/serving.md shows."""

import importlib.util
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, free_port

import csflow


@pytest.fixture(scope="module")
def served(ray_cluster: object, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the deployment of the page."""
    from ray import cloudpickle, serve

    page = (ROOT / "docs" / "howto" / "serving.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    file = tmp_path_factory.mktemp("serving") / "serving.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("serving", file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["serving"] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(module.Cells.bind(model=str(model), precision="float32"))
    yield f"http://127.0.0.1:{port}/"
    serve.shutdown()
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules["serving"]


def post(url: str, data: bytes) -> dict[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, data=data)) as answer:
        return json.loads(answer.read())


def test_the_deployment_answers_with_the_models_score(served: str, model: Path, cells: Path) -> None:
    photographs = sorted((cells / "defective").iterdir())[:6]
    results = csflow.load(model, precision="float32", device="cpu").score(photographs)
    with ThreadPoolExecutor(len(photographs)) as pool:
        answers = list(pool.map(lambda path: post(served, path.read_bytes()), photographs))
    for result, answer in zip(results, answers, strict=True):
        assert answer["anomaly_score"] == pytest.approx(result.anomaly_score, rel=1e-5)
        assert (answer["p_value"], answer["is_anomalous"]) == (result.p_value, result.is_anomalous)
        assert answer["model_id"] == result.model_id


def test_what_is_no_image_gets_an_error_and_the_deployment_stays_healthy(served: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(served, b"no image")
    assert refused.value.code == 422
    assert b"unsupported_format" in refused.value.read()
    with urllib.request.urlopen(f"{served}-/healthz") as answer:
        assert answer.read() == b"success"
