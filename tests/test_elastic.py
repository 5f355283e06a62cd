"""Pools of actors on clusters whose nodes differ and come and go; each test has a cluster of its own."""

import subprocess
import sys
from collections import Counter

import pytest

PROGRAM = """
import os, shutil, tempfile, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from csflow.cluster import WorkerResources, connect, map_shards, on_this_node, share_out

folder = Path(tempfile.mkdtemp(prefix="csflow-nodes-", dir="/tmp"))
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": str(folder),
                                                        "include_dashboard": False})

nodes = folder / "workers-nodes"
nodes.mkdir()

class Worker:
    def __init__(self, resources, fails_once):
        if fails_once:
            try:
                Path(fails_once).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                raise OSError("a blip of the store")
        self.node = ray.get_runtime_context().get_node_id()
        (nodes / self.node).touch()
        self.cpus = on_this_node(resources).cpus
        self.gpus = len(ray.get_gpu_ids())

    def __call__(self, batch):
        import pyarrow as pa
        time.sleep(0.1)
        # Later shards wait for an actor on the other node, so that it is not late for its share.
        patience = time.monotonic() + 150
        while batch["shard"][0] >= 30 and len(list(nodes.iterdir())) < 2:
            assert time.monotonic() < patience, "no actor started on the other node"
            time.sleep(0.1)
        row = {"shard": int(batch["shard"][0]), "node": self.node, "cpus": self.cpus, "gpus": self.gpus}
        return pa.Table.from_pylist([row])

def run(shards, resources, fails_once=""):
    return map_shards([{"shard": i} for i in range(shards)], Worker, (resources, fails_once), resources, 2)

try:
    SCENARIO
finally:
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
"""


def printed_by(scenario: str) -> list[str]:
    program = PROGRAM.replace("SCENARIO", scenario.replace("\n", "\n    "))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # Ray prints what its nodes say to the same place.
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("row ")]
    return [word for row in rows for word in row]


@pytest.mark.soak
def test_a_node_that_joins_takes_part_until_its_notice_and_one_that_cannot_start_an_actor_ends_nothing():
    scenario = """
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
connect()
resources = share_out(None, worker_bytes=1 << 20)
shards, joined, notice = {}, None, 0
for row in run(300, resources, fails_once=str(folder / "failed")):
    print("row", row["shard"], row["node"])
    shards[row["node"]] = shards.get(row["node"], 0) + 1
    if row["shard"] == 10:
        joined = cluster.add_node(num_cpus=1)
    if not notice and joined and shards.get(joined.node_id, 0) == 20:
        # As a cloud tells of a spot node that it takes back.
        client = ray._raylet.GcsClient(address=cluster.address)
        preempted = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
        assert client.drain_node(joined.node_id, preempted, "spot", (int(time.time()) + 600) * 1000)[0]
        notice = sum(shards.values())
print("row", notice, joined.node_id)
"""
    *words, notice, joined = printed_by(scenario)
    assert sorted(map(int, words[::2])) == list(range(300))
    nodes = words[1::2]
    assert min(Counter(nodes[: int(notice)]).values()) == 20
    assert joined not in nodes[-40:]
    assert 20 <= Counter(nodes)[joined] < 300 - int(notice)


def test_more_workers_than_gpus_are_workers_with_a_gpu_and_each_has_its_share_of_cpus():
    scenario = """
cluster.add_node(num_cpus=2, num_gpus=1)
cluster.add_node(num_cpus=12, num_gpus=2)
cluster.add_node(num_cpus=4)
os.environ["RAY_ADDRESS"] = cluster.address
connect()
for row in run(100, share_out(8)):
    print("row", row["gpus"], row["cpus"])
"""
    words = printed_by(scenario)
    assert set(words[::2]) == {"1"}
    # Asked for 2, what the smaller node has; on the larger one, half of its 12.
    assert set(words[1::2]) == {"2", "6"}
