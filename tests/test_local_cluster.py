"""cluster/local: nodes as processes, jobs submitted to them, nodes that come and go, nothing left behind."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import kustomize
import pyarrow.dataset as ds
import pytest
import s3fs
from conftest import ROOT, SMALL_MODEL

CONNECTED = "from csflow.cluster import connect; connect(); import ray; print(len(ray.nodes()), 'node')"
UNDER_WAY = ("PENDING", "RUNNING")
LISTENING = "0A"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def foreign_environment() -> dict[str, str]:
    """Without the variables of the session's own cluster and store."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}


@dataclass
class LocalCluster:
    folder: Path

    def run(self, *arguments: str) -> str:
        """`python cluster/local …`, in a clean environment."""
        command = [sys.executable, "cluster/local", "--folder", str(self.folder), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=foreign_environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def state(self) -> dict[str, str]:
        return json.loads((self.folder / "state.json").read_text())

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.folder / "env.sh").read_text().splitlines()
        pairs = (line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export"))
        return foreign_environment() | {name: value.strip("'") for name, value in pairs}

    @property
    def s3(self) -> s3fs.S3FileSystem:
        client = {"endpoint_url": self.state["s3"]}
        return s3fs.S3FileSystem(key="local", secret="local", client_kwargs=client, use_listings_cache=False)

    def ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.execute(str(Path(sys.executable).with_name("ray")), *arguments, **environment)

    def execute(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def submit(self, job_id: str, verb: str, *arguments: str) -> None:
        """As users do, without waiting for the end."""
        options = ["--no-wait", "--submission-id", job_id, "--working-dir", "."]
        done = self.ray("job", "submit", *options, "--", "python", f"jobs/{verb}.py", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def job(self, path: str) -> dict[str, str]:
        """What the job server says."""
        headers = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        request = urllib.request.Request(f"{self.state['dashboard']}/api/jobs/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def status(self, job_id: str) -> str:
        return self.job(job_id)["status"]

    def logs(self, job_id: str) -> str:
        return self.job(f"{job_id}/logs")["logs"]

    def wait_for(self, job_id: str, condition: Callable[[], object]) -> None:
        """Polls while the job is under way."""
        deadline = time.monotonic() + 300
        while not condition():
            assert self.status(job_id) in UNDER_WAY, self.logs(job_id)
            assert time.monotonic() < deadline, self.logs(job_id)
            time.sleep(0.2)

    def end(self, job_id: str) -> str:
        deadline = time.monotonic() + 300
        while (status := self.status(job_id)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self.logs(job_id)
            time.sleep(1)
        return status

    def scored(self, output: str) -> Counter[str]:
        """How many rows each photograph has."""
        files = [path for path in self.s3.find(f"{output}/scores") if path.endswith(".parquet")]
        table = ds.dataset(files, filesystem=self.s3).to_table(columns=["image_uri"]) if files else None
        uris = table["image_uri"].to_pylist() if table else []
        return Counter(uri.rsplit("/", 1)[-1] for uri in uris)

    def processes(self) -> dict[int, str]:
        """Command lines of all processes that the cluster started, by id."""
        found = {}
        for process in Path("/proc").iterdir():
            try:
                if (
                    process.name.isdigit()
                    and f"{self.folder}:".encode() in (process / "environ").read_bytes()
                ):
                    found[int(process.name)] = (process / "cmdline").read_bytes().decode()
            except OSError:
                continue
        return found

    def listening_addresses(self) -> set[str]:
        sockets = set()
        for pid in self.processes():
            try:
                sockets |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
            except OSError:
                continue
        rows = [
            line.split()
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        ]
        return {
            row[1].split(":")[0] for row in rows if row[3] == LISTENING and f"socket:[{row[9]}]" in sockets
        }


@pytest.fixture(scope="module")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    # Ray's sockets need a short path.
    cluster = LocalCluster(Path(f"/tmp/csflow-local-test-{os.getpid()}"))
    cluster.run("up", "--workers", "2")
    yield cluster
    cluster.run("down")
    assert cluster.processes() == {}
    assert not cluster.folder.exists()


@pytest.fixture(scope="module")
def photographs(local_cluster: LocalCluster, cells: Path) -> list[str]:
    """Names of the photographs below s3://csflow/night; those below s3://csflow/good are to train on."""
    good = sorted((cells / "functional" / "train").iterdir())[:48]
    night = sorted((cells / "functional" / "test").iterdir())[:500]
    for folder, paths in (("good", good), ("night", night)):
        for path in paths:
            local_cluster.s3.pipe_file(f"csflow/{folder}/{path.name}", path.read_bytes())
    return [path.name for path in night]


@pytest.fixture(scope="module")
def model_url(local_cluster: LocalCluster, photographs: list[str]) -> str:
    url = "s3://csflow/model"
    local_cluster.submit("train", "train", "--input", "s3://csflow/good", "--output", url, *SMALL_MODEL)
    assert local_cluster.end("train") == "SUCCEEDED", local_cluster.logs("train")
    assert f"written to {url}" in local_cluster.logs("train")
    return url


@pytest.mark.soak
def test_nothing_listens_beyond_loopback(local_cluster):
    assert local_cluster.processes()
    assert local_cluster.listening_addresses() <= LOOPBACK


@pytest.mark.soak
def test_scoring_goes_on_while_one_node_is_lost_and_another_joins(local_cluster, photographs, model_url):
    output = "s3://csflow/scores"
    local_cluster.submit(
        "score", "score", "--model", model_url, "--input", "s3://csflow/night", "--output", output
    )
    local_cluster.wait_for("score", lambda: local_cluster.scored(output))
    local_cluster.run("remove", "worker-1")
    local_cluster.run("add")
    assert local_cluster.end("score") == "SUCCEEDED", local_cluster.logs("score")
    assert local_cluster.scored(output) == Counter(photographs)
    assert "scored    500 images" in local_cluster.logs("score")


@pytest.mark.soak
def test_a_stopped_job_that_is_submitted_again_ends_with_the_right_rows(
    local_cluster, photographs, model_url
):
    output = "s3://csflow/stopped"
    arguments = ["--model", model_url, "--input", "s3://csflow/night", "--output", output]
    # Slowly, so that it is not done before it is stopped.
    arguments += ["--workers", "1", "--batch_size", "1"]
    local_cluster.submit("stopped", "score", *arguments)
    local_cluster.wait_for("stopped", lambda: local_cluster.scored(output))
    assert local_cluster.ray("job", "stop", "stopped").returncode == 0
    assert local_cluster.status("stopped") == "STOPPED"
    before = local_cluster.scored(output)
    assert set(before.values()) == {1}
    assert len(before) < len(photographs), "stopped too late to show anything"
    local_cluster.submit("again", "score", *arguments)
    assert local_cluster.end("again") == "SUCCEEDED", local_cluster.logs("again")
    assert local_cluster.scored(output) == Counter(photographs)


@pytest.mark.soak
def test_three_nights_over_growing_input_score_what_is_new(local_cluster, cells, model_url, tmp_path):
    """What the CronJob of cluster/kuberay runs, with the paths of this machine for those of the image."""
    resources = kustomize.build(ROOT / "cluster" / "kuberay" / "overlays" / "cpu-trial")
    (cron,) = [resource for resource in resources if resource["metadata"]["name"] == "csflow-nightly"]
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    settings = tmp_path / "score.yaml"
    output = "s3://csflow/nights"
    settings.write_text(f"model: {model_url}\ninput: s3://csflow/growing\noutput: {output}\n")
    photographs = sorted((cells / "defective").iterdir())
    for night in (1, 2, 3):
        new = photographs[(night - 1) * 20 : night * 20]
        for path in new:
            local_cluster.s3.pipe_file(f"csflow/growing/{path.name}", path.read_bytes())
        words = [word.replace("$(RUN)", f"night-{night}") for word in container["command"]]
        words = [word.replace("/opt/csflow/", f"{ROOT}/") for word in [*words, *container["args"]]]
        words = [word.replace("/etc/csflow/", f"{tmp_path}/") for word in words]
        words = [word.replace("--workers=4", "--workers=2") for word in words]
        ran = local_cluster.execute(sys.executable, *words[1:])
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert f"scored    {len(new)} images" in ran.stdout
        assert local_cluster.scored(output) == Counter(path.name for path in photographs[: night * 20])
    metrics = local_cluster.execute(sys.executable, "cluster/run_metrics.py", output, "--name", "nightly")
    assert metrics.returncode == 0, metrics.stderr
    values = dict(line.rsplit(" ", 1) for line in metrics.stdout.splitlines() if not line.startswith("#"))
    (model_id,) = {found[1] for name in values if (found := re.search('model_id="(.*?)"', name))}
    labels = f'model_id="{model_id}",name="nightly"'
    assert float(values[f"csflow_run_exit_status{{{labels}}}"]) == 0
    assert float(values[f'csflow_run_images{{{labels},state="scored"}}']) == 60
    assert time.time() - float(values[f"csflow_run_ended_timestamp_seconds{{{labels}}}"]) < 600


@pytest.mark.soak
def test_a_job_ends_where_its_workers_never_come(local_cluster, model, good_cells, tmp_path):
    command = [sys.executable, "jobs/score.py", "--model", str(model), "--input", str(good_cells)]
    command += ["--output", str(tmp_path), "--limit", "1", "--device", "gpu", "--start_timeout", "15"]
    ran = subprocess.run(
        command, cwd=ROOT, env=local_cluster.environment, capture_output=True, text=True, timeout=250
    )
    assert ran.returncode == 3, ran.stderr
    assert "no worker came within 15 s: the cluster had no node with 1 CPUs and 1 GPUs" in ran.stdout


@pytest.mark.soak
def test_the_snippet_of_the_docs_returns_the_exit_status_of_the_job(local_cluster):
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), flags=re.S)[1]
    entrypoint = f"python {ROOT}/jobs/score.py --model /no/model --input /x --output /tmp/x"
    code = f"{snippet}\nraise SystemExit(run_on_ray({entrypoint!r}, 'snippet'))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=local_cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "error: model file /no/model/config.json does not exist" in ran.stdout


@pytest.mark.soak
def test_logs_of_a_job_are_its_own_lines(local_cluster, model_url):
    lines = local_cluster.ray("job", "logs", "train").stdout.splitlines()
    assert "48 images listed" in lines
    own = [
        line for line in lines if not line.startswith(("20", "Job", "---", "Next", "    ray", "    Query"))
    ]
    assert 4 <= len(own) <= 12, lines


@pytest.mark.soak
def test_a_client_without_the_token_is_refused(local_cluster, tmp_path):
    without = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}
    for arguments in (["list"], ["submit", "--", "true"]):
        refused = local_cluster.ray("job", *arguments, **without)
        assert refused.returncode != 0
        assert "Missing authentication token" in refused.stdout + refused.stderr
    wrong = local_cluster.ray("job", "list", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode != 0
    assert "invalid" in (wrong.stdout + wrong.stderr).lower()


@pytest.mark.parametrize("verb", ["up", "down"])
@pytest.mark.parametrize("kind", ["open to others", "a link", "somebody else's"])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, kind: str, verb: str) -> None:
    folder = tmp_path / "cluster"
    (tmp_path / "other").mkdir(mode=0o700)
    if kind == "a link":
        folder.symlink_to(tmp_path / "other")
    else:
        folder.mkdir(mode=0o700)
        (folder / "env.sh").write_text("theirs")
    if kind == "open to others":
        folder.chmod(0o755)
    if kind == "somebody else's":
        if os.getuid() != 0:
            pytest.skip("only root can make a folder of somebody else's")
        os.chown(folder, 12345, 12345)
    command = [sys.executable, "cluster/local", "--folder", str(folder), verb]
    done = subprocess.run(command, cwd=ROOT, env=foreign_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {folder} must be a folder of yours that nobody else may enter")
    assert [path.read_text() for path in folder.iterdir()] == ([] if kind == "a link" else ["theirs"])


def test_the_address_of_a_killed_cluster_does_not_keep_a_job_waiting() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: sockets lie below it
        done = connected_where_a_cluster_was(Path(folder))
    assert done.stdout.endswith("\n1 node\n"), done.stderr
    assert "does not answer; starting Ray for this run" in done.stdout


def connected_where_a_cluster_was(folder: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)
    environment = foreign_environment() | {"RAY_TMPDIR": str(folder)}
    command = [sys.executable, "-c", CONNECTED]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
