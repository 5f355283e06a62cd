"""A Ray cluster of several nodes and an S3 server, as processes of this machine, for trying everything.

    python cluster/local up                 # a head, two workers, S3; on loopback, with a token
    source /tmp/csflow-local-$UID/env.sh    # what clients need
    ray job submit --working-dir . -- python jobs/score.py --model s3://csflow/model …
    python cluster/local add                # one more worker
    python cluster/local remove worker-1    # as a lost spot node: killed, not drained
    python cluster/local down

For Linux. What is in the S3 server is lost with it.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
NODE_VARIABLE = "CSFLOW_LOCAL_NODE"
"""Inherited by every process of a node, jobs included, and by nothing else: so it tells which to end."""
LOOPBACK = "127.0.0.1"
BUCKET = "csflow"
OBJECT_STORE_BYTES = 200_000_000
# Ray gives a node the machine's outward address and listens there, even if told 127.0.0.1, unless it takes
# the machine for one whose clusters are of a single node. Then `ray start` refuses workers, so they are
# started past that check.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
RAY_CLI = """\
import ray._private.ray_constants as constants, ray._private.services as services, ray.scripts.scripts as cli
constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda *_: "127.0.0.1"
cli.main()
"""
START_SECONDS = 120
STOP_SECONDS = 30


class Cluster:
    """What a folder knows of its cluster: `state.json`, the token, logs, and the node names of processes."""

    def __init__(self, folder: Path) -> None:
        # Ray puts sockets below it, whose paths have at most 107 characters.
        self.folder = folder.absolute()
        self.state: dict[str, Any] = {}
        self._check_folder()
        if (self.folder / "state.json").exists():
            self.state = json.loads((self.folder / "state.json").read_text())

    def up(self, workers: int, cpus: int) -> None:
        if self.state or list(self.processes()):
            raise SystemExit(f"error: there is a cluster in {self.folder} already; take it down first")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_folder()
        (self.folder / "token").touch(mode=0o600)
        (self.folder / "token").write_text(secrets.token_hex(32))
        gcs, dashboard, s3 = free_port(), free_port(), free_port()
        self.state = {
            "gcs": f"{LOOPBACK}:{gcs}",
            "dashboard": f"http://{LOOPBACK}:{dashboard}",
            "s3": f"http://{LOOPBACK}:{s3}",
            "cpus": cpus,
            "next_worker": 1,
        }
        self._save()
        self.start("s3", [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(s3)])
        head = ["--head", f"--port={gcs}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"]
        head += [f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder / 'ray'}"]
        self.start("head", self._ray_start(head))
        wait_until(lambda: is_listening(gcs) and is_listening(dashboard) and is_listening(s3), self._failed)
        create_bucket(self.state["s3"])
        for _ in range(workers):
            self.add()
        print(f"cluster of {workers + 1} nodes, dashboard {self.state['dashboard']}, S3 {self.state['s3']}")
        print(f"source {self.folder / 'env.sh'}")

    def add(self) -> None:
        """Starts one more worker and waits until the cluster counts it."""
        name = f"worker-{self.state['next_worker']}"
        self.state["next_worker"] += 1
        self._save()
        self.start(name, self._ray_start([f"--address={self.state['gcs']}"]))
        wait_until(lambda: name in self.alive_nodes(), self._failed)
        print(f"{name} has joined")

    def remove(self, name: str) -> None:
        if not self.kill(name):
            raise SystemExit(f"error: there is no node {name} in {self.folder}")
        print(f"{name} is gone")

    def down(self) -> None:
        ended = self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        print(f"{ended} processes ended, {self.folder} removed")

    def start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            subprocess.Popen(
                command,
                env=os.environ | self.client_environment() | {NODE_VARIABLE: self._mark(name)},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def client_environment(self) -> dict[str, str]:
        """Variables by which Ray and S3 clients find the cluster; the keys are those of a test server."""
        return LOOPBACK_ONLY | {
            "RAY_ADDRESS": self.state["gcs"],
            "RAY_API_SERVER_ADDRESS": self.state["dashboard"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "AWS_ENDPOINT_URL": self.state["s3"],
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            # Jobs find `python` through it.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def alive_nodes(self) -> set[str]:
        """Names of the nodes that the cluster counts as alive."""
        os.environ |= self.client_environment()
        from ray.util.state import list_nodes  # reads the variables when it is imported

        nodes = list_nodes(address=self.state["dashboard"], raise_on_missing_output=False)
        return {node.node_name for node in nodes if node.state == "ALIVE"}

    def processes(self, name: str | None = None) -> Iterator[int]:
        """Ids of the processes of one node, or of all."""
        wanted = f"{NODE_VARIABLE}={self._mark(name or '')}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                try:
                    variables = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue  # another user's, or it has just ended
                if any(v == wanted if name else v.startswith(wanted) for v in variables):
                    yield int(folder.name)

    def kill(self, name: str | None = None) -> int:
        """Ends the processes of one node, or of all; returns how many there were."""
        ended: set[int] = set()

        def none_is_left() -> bool:
            pids = list(self.processes(name))
            for pid in pids:
                ended.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(none_is_left, lambda: f"processes {list(self.processes(name))} do not end", STOP_SECONDS)
        return len(ended)

    def _ray_start(self, arguments: Sequence[str]) -> list[str]:
        """A node with ports of its own, so that several share the machine; 0 lets workers take free ones."""
        name = "head" if "--head" in arguments else f"worker-{self.state['next_worker'] - 1}"
        command = [sys.executable, "-c", RAY_CLI, "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={LOOPBACK}", f"--node-name={name}"]
        command += [f"--num-cpus={self.state['cpus']}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        ports = ["node-manager", "object-manager", "metrics-export", "runtime-env-agent"]
        command += [f"--{port}-port={free_port()}" for port in ports]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0"]
        return [*command, "--max-worker-port=0", *arguments]

    def _check_folder(self) -> None:
        """Ends the program if the folder, should it exist, is open to others: they could read the token, or
        replace `env.sh` before it is sourced.
        """
        try:
            status = self.folder.lstat()
        except FileNotFoundError:
            return
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if not is_own or stat.S_IMODE(status.st_mode) & 0o077:
            raise SystemExit(
                f"error: {self.folder} must be a folder of yours that nobody else may enter (chmod 700); "
                "choose another --folder, or remove it if it is yours"
            )

    def _mark(self, name: str) -> str:
        return f"{self.folder}:{name}"

    def _save(self) -> None:
        (self.folder / "state.json").write_text(json.dumps(self.state, indent=2))
        # A token in the environment would win over the file.
        lines = ["unset RAY_AUTH_TOKEN"]
        lines += [f"export {name}='{value}'" for name, value in self.client_environment().items()]
        (self.folder / "env.sh").write_text("\n".join(lines) + "\n")

    def _failed(self) -> str:
        return f"the cluster does not start; see {self.folder}/*.log, and take it down"


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


def is_listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex((LOOPBACK, port)) == 0


def wait_until(
    condition: Callable[[], bool], failed: Callable[[], str], seconds: float = START_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {failed()}")
        time.sleep(0.2)


def create_bucket(endpoint: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="local",
        aws_secret_access_key="local",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)


def main(arguments: Mapping[str, Any]) -> None:
    os.environ.pop("RAY_AUTH_TOKEN", None)  # would win over the cluster's own
    cluster = Cluster(arguments["folder"])
    verb = arguments["verb"]
    if verb in ("add", "remove") and not cluster.state:
        raise SystemExit(f"error: there is no cluster in {cluster.folder}; start one with `up`")
    if verb == "up":
        cluster.up(arguments["workers"], arguments["cpus"])
    elif verb == "add":
        cluster.add()
    elif verb == "remove":
        cluster.remove(arguments["node"])
    else:
        cluster.down()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python cluster/local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path(f"/tmp/csflow-local-{os.getuid()}"))
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start it")
    up.add_argument("--workers", type=int, default=2, help="nodes beside the head [default: 2]")
    up.add_argument("--cpus", type=int, default=1, help="CPUs that each node offers [default: 1]")
    verbs.add_parser("add", help="start one more worker")
    verbs.add_parser("remove", help="kill a worker").add_argument("node")
    verbs.add_parser("down", help="end all of it")
    main(vars(parser.parse_args()))
