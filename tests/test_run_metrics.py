"""cluster/run_metrics.py: what Prometheus hears of nights, from nothing but the files that they leave."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import faulty_s3
import pytest
import yaml
from conftest import ROOT, find_tool, free_port, wait_for
from scored_output import OLD_MODEL, write_record

from csflow.errors import ExitStatus
from csflow.output.layout import new_run_id, run_started_at
from csflow.output.runs import Progress
from csflow.storage import Location

SCRIPT = ROOT / "cluster" / "run_metrics.py"
MONDAY = datetime(2026, 11, 2, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_metrics", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def night(output: Path, started: datetime, hours: float | None = 3, **changes: Any) -> str:
    """A night that began then and, unless it is open, has ended; it gave a sign of life after two hours."""
    run_id = new_run_id(started)
    progress = {"updated_at": started + 2 * HOUR, "step": "score", "done": 30, "of": 40}
    Progress(run_id=run_id, started_at=started, **progress).write(Location(str(output)))
    if hours is not None:
        write_record(output, run_id, started_at=started, ended_at=started + hours * HOUR, **changes)
    return run_id


def values(script: ModuleType, output: Path) -> dict[str, float]:
    """The metrics of an output, by name, and by name and state for images."""
    found = script.Runs(Location(str(output))).samples()
    return {
        " ".join([name, *labels.values()]).replace(f" {OLD_MODEL}", ""): value
        for name, labels, value in found
    }


def test_a_run_id_begins_with_the_time():
    assert run_started_at(new_run_id(MONDAY)) == MONDAY
    assert run_started_at("lost+found") is None


def test_a_good_night_is_done_and_no_longer_open(script, tmp_path):
    night(tmp_path, MONDAY)
    told = values(script, tmp_path)
    assert told["csflow_run_open"] == 0
    assert told["csflow_run_last_done_timestamp_seconds"] == (MONDAY + 3 * HOUR).timestamp()
    assert told["csflow_run_exit_status"] == 0
    assert told["csflow_run_duration_seconds"] == 3 * 3600
    assert told["csflow_run_images scored"] == 3


def test_a_night_at_work_is_open_and_tells_when_it_last_got_something_done(script, tmp_path):
    night(tmp_path, MONDAY)
    night(tmp_path, MONDAY + 24 * HOUR, hours=None)
    told = values(script, tmp_path)
    assert told["csflow_run_open"] == 1
    assert told["csflow_run_started_timestamp_seconds"] == (MONDAY + 24 * HOUR).timestamp()
    assert told["csflow_run_progress_timestamp_seconds"] == (MONDAY + 26 * HOUR).timestamp()
    assert told["csflow_run_progress_ratio"] == 0.75
    assert told["csflow_run_last_done_timestamp_seconds"] == (MONDAY + 3 * HOUR).timestamp()


def test_a_night_that_was_cut_off_before_its_first_sign_of_life_began_at_least(script, tmp_path):
    (tmp_path / "_runs" / new_run_id(MONDAY) / "listing").mkdir(parents=True)
    told = values(script, tmp_path)
    assert told["csflow_run_open"] == 1
    assert told["csflow_run_progress_timestamp_seconds"] == MONDAY.timestamp()
    assert told["csflow_run_last_done_timestamp_seconds"] == 0


def test_an_incomplete_night_is_not_done_and_a_drifted_one_is(script, tmp_path):
    night(tmp_path, MONDAY)
    missing = {"listed": 3, "scored": 2, "missing": 1}
    night(tmp_path, MONDAY + 24 * HOUR, exit_status=3, status="incomplete", counts=missing)
    told = values(script, tmp_path)
    assert told["csflow_run_exit_status"] == 3 and told["csflow_run_images missing"] == 1
    assert told["csflow_run_last_done_timestamp_seconds"] == (MONDAY + 3 * HOUR).timestamp()
    night(tmp_path, MONDAY + 48 * HOUR, exit_status=4, status="drift")
    told = values(script, tmp_path)
    assert told["csflow_run_exit_status"] == 4
    assert told["csflow_run_last_done_timestamp_seconds"] == (MONDAY + 51 * HOUR).timestamp()


def test_an_output_without_runs_says_that_none_was_ever_done(script, tmp_path):
    assert values(script, tmp_path) == {"csflow_run_last_done_timestamp_seconds": 0}


def test_a_store_that_cannot_be_read_leaves_the_last_answer_and_says_so(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "REREAD_SECONDS", -1.0)
    store = faulty_s3.FaultyS3()
    try:
        night(tmp_path, MONDAY)
        for file in (path for path in tmp_path.rglob("*") if path.is_file()):
            store.put(f"scores/{file.relative_to(tmp_path)}", file.read_bytes())
        output = Location(f"s3://{faulty_s3.BUCKET}/scores", store.options)
        collector = script.RunCollector("nightly", script.Runs(output))
        before = dict(collected(collector))
    finally:
        store.stop()
    assert before.pop("csflow_output_readable") == 1
    assert before["csflow_run_exit_status"] == 0
    after = dict(collected(collector))
    assert after.pop("csflow_output_readable") == 0
    assert after == before


def collected(collector: Any) -> Iterator[tuple[str, float]]:
    for family in collector.collect():
        for sample in family.samples:
            assert sample.labels["name"] == "nightly"
            yield sample.name, sample.value


def test_it_is_served_and_printed_in_the_format_of_prometheus(tmp_path):
    from prometheus_client.parser import text_string_to_metric_families

    night(tmp_path / "out", MONDAY, counts={"errors_in_this_run": {"truncated": 2}})
    (tmp_path / "score.yaml").write_text(f"model: m\ninput: i\noutput: {tmp_path}/out\n")
    settings, port = ["--config", str(tmp_path / "score.yaml"), "--name", "nightly"], free_port()
    printed = subprocess.run([sys.executable, SCRIPT, *settings], capture_output=True, text=True, check=True)
    families = {family.name: family for family in text_string_to_metric_families(printed.stdout)}
    (errors,) = families["csflow_run_errors"].samples
    assert errors.labels == {"name": "nightly", "model_id": OLD_MODEL, "code": "truncated"}
    assert all(family.documentation for family in families.values())
    server = subprocess.Popen([sys.executable, SCRIPT, *settings, "--port", str(port)])
    try:
        wait_for(lambda: answers(port), server)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            assert answer.read().decode() == printed.stdout
    finally:
        server.kill()
        server.wait()


def test_a_prometheus_hears_of_a_drifted_night_and_raises_that_alert_alone(tmp_path):
    prometheus = find_tool("prometheus")
    now = datetime.now(UTC)
    night(tmp_path / "out", now - 4 * HOUR, exit_status=ExitStatus.DRIFT, status="drift")
    rule = yaml.safe_load((ROOT / "cluster" / "dashboards" / "alerts.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    port, own_port = free_port(), free_port()
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "csflow", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
    serve = [sys.executable, SCRIPT, tmp_path / "out", "--name", "nightly", "--port", str(port)]
    watch = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    watch += [f"--web.listen-address=127.0.0.1:{own_port}", "--log.level=error"]
    processes = [subprocess.Popen(command) for command in (serve, watch)]
    try:
        wait_for(lambda: answers(port), processes[0])
        wait_for(lambda: "firing" in alerts(own_port).values(), processes[1])
        # Kubernetes is not there to tell of its Job, and the run has ended.
        assert alerts(own_port) == {"CsflowDrift": "firing"}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def alerts(port: int) -> dict[str, str]:
    """State by name of the alerts that a Prometheus knows; none while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/alerts", timeout=30) as answer:
            found = json.load(answer)["data"]["alerts"]
    except OSError:
        return {}
    return {alert["labels"]["alertname"]: alert["state"] for alert in found}


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).close()
    except OSError:
        return False
    return True


def test_wrong_use_is_said_in_one_line(tmp_path):
    for words, said in [
        (["--name", "nightly"], "give either the output, or --config"),
        (["--name", "nightly", "--config", str(tmp_path / "none.yaml")], "names no output"),
    ]:
        ran = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
        assert ran.returncode == ExitStatus.WRONG_USE
        assert said in ran.stderr and ran.stderr.count("\n") == 1
