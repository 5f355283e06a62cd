"""Runs one training under Ray Train: its name, its workers, its progress and its result."""

import hashlib
import json
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from csflow.cluster import in_thread, node_resources, share_out
from csflow.console import warn
from csflow.errors import DamagedFile, Failed
from csflow.literal_paths import arrow_filesystem
from csflow.model import Architecture
from csflow.storage import Location, to_parquet
from csflow.training.cache import FeatureCache
from csflow.training.checkpoint import PROGRESS_FILE, damaged, read_checkpoint, with_prefix
from csflow.training.closing import calibration_table
from csflow.training.config import TrainConfig
from csflow.training.live import LiveView
from csflow.training.loop import LoopSettings
from csflow.training.recipe import RECIPES
from csflow.training.shards import fingerprint
from csflow.training.split import TrainingData
from csflow.training.worker import WorkerSettings, train_worker

WORKER_RETRIES = 3
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of its checkpoints. It is not written whole, so a killed training may leave half of it."""
MEMORY_SHARE = 0.5
"""Share of a node's memory for its workers' features."""


@dataclass(frozen=True)
class Result:
    state: dict[str, Tensor]
    """State of the detector without the backbone; the flow is that of the best epoch."""
    calibration: pa.Table
    """The columns `closing.CALIBRATED` over the held-out images, in the order of the split."""
    heldout_loss: float
    validation_loss: float | None
    """Validation loss of the finished model; None without validation images. In a cross-calibration it is the
    held-out loss."""
    gaussian_loss: float | None
    """Validation loss of the Gaussian of each position alone; None without whitening."""
    history: list[dict[str, Any]]
    best_epoch: int


class Run:
    """A training, named by everything that decides its result, so that --resume cannot continue another."""

    def __init__(
        self,
        config: TrainConfig,
        architecture: Architecture,
        cache: FeatureCache,
        data: TrainingData,
        work_dir: Location,
        gaussians: Location | None,
    ) -> None:
        """
        Args:
            architecture: of the detector that made the cache.
            gaussians: what `write_gaussians` has written for the training images; None without whitening.
        """
        self._config, self._cache, self._data = config, cache, data
        self._samples = cache.sample_count(data.subset("training"))
        loop = LoopSettings.of(config, self._samples)
        self._loop = replace(loop, architecture=architecture)
        subsets = data.split["subset"].to_pylist(), data.split["content_digest"].to_pylist()
        decides = [asdict(self._loop), config.augment, cache.folder.name, fingerprint(*subsets)]
        if data.is_cross and data.has_parts:
            decides.append(data.split["fold"].to_pylist())
        self.name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
        self._folder = work_dir / "training" / self.name
        self._split = work_dir / "splits" / f"{self.name}.parquet"
        self._gaussians = gaussians
        self._tensorboard = work_dir / "tensorboard" / self.name

    @property
    def epochs(self) -> int:
        """Largest number of passes over the training images."""
        return self._loop.epochs

    @property
    def recommended_epochs(self) -> int:
        """What `epochs` is without the setting."""
        return self._config.recommended_epochs(self._samples)

    @property
    def checkpoint_epochs(self) -> int:
        """Number of epochs between two checkpoints."""
        recipe = RECIPES[self._config.recipe]
        return self._config.checkpoint_epochs or recipe.checkpoint_epochs(self._samples)

    def has_checkpoint(self) -> bool:
        """Whether an earlier run of this training has left a checkpoint."""
        return bool(self._folder.find(PROGRESS_FILE))

    def fit(self) -> Result:
        """Trains until the end, restarting workers that die. Raises Failed if the training diverges."""
        if not self._config.resume and self._folder.exists():
            self._folder.remove_folder()
        try:
            check_continuable(self._folder)
        except DamagedFile as error:
            warn(f"{error.what}; {self._folder} is removed, and the training begins anew")
            self._folder.remove_folder()
        self._split.write(to_parquet(self._data.split))
        # Beside this process, without which the training ends anyway; any other node may be lost.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        progress = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        follower = threading.Thread(target=self._follow, args=(progress,), daemon=True)
        follower.start()
        try:
            # In this thread Ray Train would take Ctrl-C over, and end the process with status 0.
            result: Any = in_thread(self._trainer(progress).fit)
        finally:
            progress.put(None)
            follower.join()
            progress.shutdown()
        if result.return_value is not None:
            raise Failed(f"the training failed: {result.return_value}")
        if result.checkpoint is None:
            raise RuntimeError(f"training ended without a checkpoint below {self._folder}")
        try:
            with result.checkpoint.as_directory() as folder:
                tensors, state = read_checkpoint(folder)
        except DamagedFile as error:
            raise Failed(str(error)) from None
        gaussian_loss = tensors.get("closing.gaussian_loss")
        has_validation = self._data.is_cross or self._data.subset("validation").num_rows > 0
        return Result(
            state={f"flow.{name}": value for name, value in with_prefix(tensors, "best.").items()}
            | with_prefix(tensors, "closing.state."),
            calibration=calibration_table(with_prefix(tensors, "closing.calibration.")),
            heldout_loss=tensors["closing.heldout_loss"].item(),
            validation_loss=tensors["closing.usual_loss"].item() if has_validation else None,
            gaussian_loss=gaussian_loss.item() if gaussian_loss is not None else None,
            history=state["history"],
            best_epoch=state["best_epoch"],
        )

    def _trainer(self, progress: Queue) -> ray.train.torch.TorchTrainer:
        resources = share_out(self._config.workers, device=self._config.device)
        settings = WorkerSettings(
            loop=self._loop,
            cache=self._cache,
            split=self._split,
            gaussians=self._gaussians,
            is_cross=self._data.is_cross,
            augment=self._config.augment,
            memory_bytes=self._memory_bytes(resources.workers),
            checkpoint_epochs=self.checkpoint_epochs,
            resources=resources,
        )
        workers: int | tuple[int, int] = resources.workers
        if self._config.min_workers is not None:
            workers = (self._config.min_workers, resources.workers)
        return ray.train.torch.TorchTrainer(
            lambda: train_worker(settings, progress),  # type: ignore[arg-type]  # it may return something
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,  # type: ignore[arg-type]  # a pair is what makes it elastic
                use_gpu=resources.gpus > 0,
                resources_per_worker={"CPU": resources.cpus},
            ),
            run_config=ray.train.RunConfig(
                name=self.name,
                storage_path=self._folder.parent.path,
                storage_filesystem=arrow_filesystem(self._folder.fs),
                failure_config=ray.train.FailureConfig(max_failures=WORKER_RETRIES),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        )

    def _memory_bytes(self, workers: int) -> int:
        """Bytes of features that a worker may keep in memory."""
        if self._config.features_in_memory is not None:
            return int(self._config.features_in_memory * 1e9)
        # All workers may come to one node.
        smallest = min(node.get("memory", 0) for node in node_resources())
        return int(smallest * MEMORY_SHARE / workers)

    def _follow(self, progress: Queue) -> None:
        # In one thread from start to end: MLflow's runs belong to threads.
        view = LiveView(self._config, self._loop.epochs, self._tensorboard, self._data.is_cross)
        while (line := progress.get()) is not None:
            view.show(line)
        view.close()


def check_continuable(folder: Location) -> None:
    """Reads what an earlier run has left in Ray Train's folder of a training, as Ray and a worker will do.

    Raises:
        DamagedFile: the training cannot continue from it.
        StorageFailed: a file cannot be read.
    """
    files = folder.find("")
    if not files:
        return
    snapshot = folder / SNAPSHOT_FILE
    with tempfile.TemporaryDirectory() as copy:
        # Ray reads a copy, so that none of its errors is one of the store. It asks whether checkpoints exist.
        for name in {file.parent.name for file in files} - {folder.name}:
            (Path(copy) / name).mkdir()
        if snapshot in files:
            (Path(copy) / SNAPSHOT_FILE).write_bytes(snapshot.read())
        try:
            checkpoint = ray.train.Result.from_path(copy).checkpoint
        except Exception as error:
            raise damaged(str(snapshot), error) from None
    if checkpoint is not None:
        location = folder / Path(checkpoint.path).name
        remote = ray.train.Checkpoint(location.path, arrow_filesystem(folder.fs))
        with remote.as_directory() as directory:
            read_checkpoint(directory, location.url)
