"""What csflow's jobs need of Ray: connecting, sizing a pool of actors, and running shards through it."""

import logging
import math
import os
import queue
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data

from csflow import process
from csflow.config import Decode
from csflow.console import is_verbose, warn
from csflow.inputs.helpers import Helpers, Load
from csflow.inputs.loading import HelpingLoader, LoaderSettings
from csflow.precision import Device
from csflow.threads import ROWS_THREAD, let_waiting_threads_sleep

T = TypeVar("T")

MAX_BLOCKS = 4096
"""Largest number of blocks, each of which costs memory on the driver. More shards than this share blocks."""

BACKEND_LEVEL = "RAY_BACKEND_LOG_LEVEL"
SHARD_RETRIES = 2
"""How often a shard is tried again after its actor died. Ray's own default has no limit."""
DECODING_CPUS = 4
"""Most CPUs beside a GPU that a worker keeps, if helpers may decode. More threads in one process would wait
for the interpreter's lock; helpers on the remaining CPUs do not."""
CONNECT_TIMEOUT_S = 5.0
START_RETRIES = 10
"""How many actors of a pool may fail to start, one after the other. Ray's own default is none."""


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names (`ray job submit` sets it), else the cluster that runs on this
    machine, else starts Ray for this process.

    A cluster that was killed leaves its address behind, at which Ray would wait for many minutes. It counts
    as none.
    """
    level = logging.INFO if is_verbose() else logging.ERROR
    # Else Ray Data starts one more worker process, only to count how it is used.
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    let_waiting_threads_sleep()  # workers on this machine inherit it
    if not ray.is_initialized():
        address = None
        if (old := _started_here()) and not _answers(old):
            warn(
                f"the Ray cluster {old}, started on this machine, does not answer; starting Ray for this run"
            )
            address = "local"
        with _quiet_backend():
            ray.init(address, logging_level=level, log_to_driver=is_verbose(), include_dashboard=False)
    # Ray Data has no other way yet to bound an actor's retries.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A block that fails after its retries is missing from the results, where the job accounts for it.
    context.max_errored_blocks = -1
    # A pool grows when its actors have all the shards that they may have. By default it waits for more than
    # two shards for each thread, which actors of several threads never have.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # One node on which no actor can start must not end a run that others carry on.
    context.max_consecutive_actor_init_deaths = START_RETRIES
    logging.getLogger("ray.data").setLevel(level)


def _started_here() -> str | None:
    """The address of the cluster that `ray start` began here last; None if RAY_ADDRESS is set."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(folder) / "ray" / "ray_current_cluster"
    if os.environ.get("RAY_ADDRESS") or not file.exists():
        return None
    return file.read_text().strip()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Keeps Ray's C++ side from printing to standard error, now and later, unless the user asked for it.

    What it prints there, Ray's Python side raises or retries anyway. A variable sets its log level, but it
    first prints a line about the new level; only that line is filtered out of what is written meanwhile.
    """
    if is_verbose() or BACKEND_LEVEL in os.environ:
        yield
        return
    os.environ[BACKEND_LEVEL] = "fatal"
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            os.write(2, b"".join(line for line in written if BACKEND_LEVEL.encode() not in line))


@dataclass(frozen=True)
class WorkerResources:
    """What each worker has, the same for all, and how many workers there are."""

    workers: int
    """Number of workers to begin with."""
    cpus: int
    gpus: int
    memory: int = 0
    """Bytes that a worker needs, 0 if that is not known."""
    most: int | None = None
    """Largest number of workers when nodes join; None if there is no limit."""
    decode: Decode = "beside"
    """Whether other CPUs help a worker with reading and decoding."""


def node_resources() -> list[dict[str, float]]:
    """What each node of the cluster has, by the name of the resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def share_out(
    workers: int | None, worker_bytes: int = 0, device: Device = "auto", decode: Decode = "beside"
) -> WorkerResources:
    """Divides the cluster among `workers`; by default one per GPU, or one per CPU, and more as nodes join.

    Many workers of one thread are faster than few of several threads, which wait for each other at every
    layer. There are no more workers than fit into memory.

    Args:
        workers: number of workers. Those for which there is no room yet start when there is.
        worker_bytes: memory that one worker needs.
        device: `auto` is `gpu` if a node has one.
        decode: `auto` is `beside` on CPUs, which all work for the model anyway.
    """
    nodes = node_resources()
    with_gpu = [node for node in nodes if node.get("GPU")]
    if device == "gpu" or (device == "auto" and with_gpu):
        gpus = max(1, sum(int(node["GPU"]) for node in with_gpu))
        fitting = _fit(with_gpu, min(workers or gpus, gpus), gpus=1)
        cpus = fitting.cpus if decode == "beside" else min(fitting.cpus, DECODING_CPUS)
        return replace(fitting, workers=workers or gpus, most=workers, cpus=cpus, decode=decode)
    rooms = [int(node.get("memory", 0)) // max(1, worker_bytes) for node in nodes]
    room = sum(min(int(node.get("CPU", 0)), of_memory) for node, of_memory in zip(nodes, rooms, strict=True))
    fitting = _fit(nodes, workers or max(1, room), gpus=0)
    # Ray keeps to memory when nodes join, if there is a node that has enough for one.
    is_bounded = bool(worker_bytes) and max(rooms, default=0) > 0 and workers is None
    memory = worker_bytes if is_bounded else 0
    fitting = replace(fitting, memory=memory, most=None if is_bounded else fitting.workers)
    return replace(fitting, cpus=1, decode=decode) if decode == "cluster" else fitting


def described(resources: WorkerResources) -> str:
    """Workers, their number and their devices, in words."""
    workers = f"{resources.workers} worker{'s' * (resources.workers != 1)}"
    cpus = f"{resources.cpus} CPU{'s' * (resources.cpus != 1)}"
    return f"{workers} of {'a GPU and ' * bool(resources.gpus)}{cpus}"


def has_room(resources: WorkerResources) -> bool:
    """Whether the cluster has a node for such a worker now; an autoscaler may be yet to start one."""
    return any(
        node.get("CPU", 0) >= resources.cpus and node.get("GPU", 0) >= resources.gpus
        for node in node_resources()
    )


def on_this_node(resources: WorkerResources) -> WorkerResources:
    """What a worker has on the node where it runs: beside a GPU, an equal share of the node's CPUs.

    Nodes differ, and all workers ask for what the smallest share is. The CPUs that are left to helpers are
    nobody's share.
    """
    if not resources.gpus or resources.decode != "beside":
        return resources
    node = _this_node()
    share = int(node["CPU"]) * resources.gpus // int(node["GPU"])
    return replace(resources, cpus=max(resources.cpus, share))


def _this_node() -> dict[str, float]:
    """What the node of this process has."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)


def _fit(nodes: Sequence[Mapping[str, float]], workers: int, gpus: int) -> WorkerResources:
    """The largest number of CPUs for each worker with which all workers fit on the nodes."""

    def room(cpus: int) -> int:
        rooms = (int(node.get("CPU", 0)) // cpus for node in nodes)
        return sum(min(p, int(node["GPU"])) if gpus else p for p, node in zip(rooms, nodes, strict=True))

    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    cpus = next((cpus for cpus in range(largest, 1, -1) if room(cpus) >= workers), 1)
    return WorkerResources(workers, cpus, gpus)


ONE_CPU = WorkerResources(workers=1, cpus=1, gpus=0)


def run_task(function: Callable[..., T], *arguments: Any, resources: WorkerResources = ONE_CPU) -> T:
    """Runs a function once, on some node of the cluster; returns its result.

    Args:
        function: takes the `torch.device` to compute on, and then the arguments.
    """

    def task(*arguments: Any) -> T:
        # Always: Ray may reuse a process that computed with more threads, which round differently.
        return function(process.set_up(resources.cpus, resources.gpus), *arguments)

    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=SHARD_RETRIES)(task)
    result: T = ray.get(remote.options(name=function.__name__).remote(*arguments))
    return result


def helpers(settings: LoaderSettings, resources: WorkerResources) -> Helpers | None:
    """Helpers that load images in actors of one CPU each, on any node; None if there are to be none."""
    # Images that keep their size are too large to travel, and the model has work enough for each.
    if resources.decode == "beside" or settings.preprocessing.tiling:
        return None
    # What takes its process down may be an image, and the worker knows what to do about that.
    actors: Any = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(HelpingLoader)

    @contextmanager
    def helper() -> Iterator[Load]:
        actor = actors.remote(settings)
        try:
            ray.get(actor.load.remote([]))
            yield lambda images: partial(ray.get, actor.load.remote(images))
        finally:
            ray.kill(actor)

    pixel_bytes = 3 * math.prod(settings.preprocessing.image_size)
    return Helpers(helper, pixel_bytes, resources.decode == "cluster", _store_share(resources))


def _store_share(resources: WorkerResources) -> int:
    """Bytes of the object store of this node that a worker may fill: its share of a half.

    The images that wait for the worker are there, and the rest is for those that are on their way.
    """
    node = _this_node()
    workers = node["GPU"] if resources.gpus else node["CPU"] // resources.cpus
    return int(node["object_store_memory"] / 2 / workers)


def spilled_bytes() -> int:
    """Bytes that the object stores of the present nodes have moved to disk so far, for whatever job; 0 if Ray
    does not tell."""
    try:
        # There is no public way to ask. Ray Data asks so for its own summary.
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)
    except Exception:  # a node that is just going, another version of Ray: no reason to fail a run
        return 0


def in_thread(function: Callable[[], T]) -> T:
    """Runs a function in a thread, so that Ctrl-C reaches the calling thread; returns its result."""
    return next(with_timeout((call() for call in [function]), None))


def map_shards(
    shards: Sequence[Mapping[str, Any]],
    shard_worker: type,
    constructor_args: Sequence[Any],
    resources: WorkerResources,
    calls_per_worker: int = 1,
    retries: int = SHARD_RETRIES,
) -> Generator[dict[str, Any], None, None]:
    """Runs every shard through a pool of actors, and yields one result row per shard as shards finish.

    A shard whose actor died more than `retries` times yields no row.

    Args:
        shards: a small row per shard.
        shard_worker: class whose instances map a batch of one shard row to a batch of one result row.
        calls_per_worker: how many threads call an instance at once.
    """
    blocks = min(len(shards), MAX_BLOCKS)
    dataset = ray.data.from_items([dict(shard) for shard in shards], override_num_blocks=blocks)
    results = dataset.map_batches(
        shard_worker,
        fn_constructor_args=tuple(constructor_args),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(resources.workers, blocks),
            max_size=min(resources.most or blocks, blocks),
            # A shard that waits for its actor could have gone to a faster one, and would die with this one.
            max_tasks_in_flight_per_actor=max(2, calls_per_worker),
            max_concurrent_calls_per_actor=calls_per_worker,
            enable_true_multi_threading=calls_per_worker > 1,
        ),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        memory=resources.memory or None,
        max_restarts=-1,
        max_task_retries=retries,
    )
    yield from results.iter_rows()


def with_timeout(
    rows: Generator[T, None, None], seconds: float | None, first: float | None = None
) -> Iterator[T]:
    """Yields the rows of a generator that may hang, which runs in a thread.

    If the caller stops early, the generator is closed when its next row comes, and gives back what it holds.

    Args:
        first: seconds until the first row, if they are others.

    Raises:
        TimeoutError: the next row takes longer. The generator stays behind in its thread.
    """
    timeout = seconds if first is None else first
    results: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    is_wanted = True

    def pull() -> None:
        try:
            for row in rows:
                if not is_wanted:
                    rows.close()
                    return
                results.put((row,))
            results.put(None)
        except BaseException as error:
            results.put(error)

    threading.Thread(target=pull, name=ROWS_THREAD, daemon=True).start()
    try:
        while True:
            try:
                result = results.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError from None
            timeout = seconds
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result[0]
    finally:
        is_wanted = False
