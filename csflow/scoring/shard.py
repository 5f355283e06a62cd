"""The scoring actor: reads, decodes and scores one shard of images, and publishes its rows."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from csflow import device
from csflow.calibration import p_values
from csflow.cluster import WorkerResources
from csflow.device import peak_memory_bytes
from csflow.errors import ImageError
from csflow.images import DecodedImage
from csflow.inputs.isolation import IsolatedLoader
from csflow.inputs.loading import ImageLoader, LoadedImage, batches
from csflow.inputs.reading import ImageReader
from csflow.model import InferenceDetector, PrecisionSetting, Scores
from csflow.model_directory import load_model
from csflow.scores import ERRORS, SCORES
from csflow.scoring.output import Output
from csflow.scoring.plan import PlannedShard
from csflow.storage import Location, to_parquet

READ_THREADS = 8
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 8, 32
"""Default images per forward pass. More is slower on CPUs: early activations leave the cache."""

RESULT = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("images", pa.int64()),
        pa.field("scored", pa.int64()),
        pa.field("anomalous", pa.int64()),
        pa.field("error_codes", pa.map_(pa.string(), pa.int64())),
        pa.field("is_published", pa.bool_()),  # false if another attempt was first
        pa.field("seconds", pa.map_(pa.string(), pa.float64())),  # by stage, summed over threads
        pa.field("anomaly_scores", pa.list_(pa.float64())),
        pa.field("p_values_below_5_percent", pa.int64()),
        pa.field("precision", pa.string()),  # of the worker
        pa.field("peak_memory_bytes", pa.int64()),  # of the worker process so far
        pa.field("failure", pa.string()),  # why the whole shard failed, if it did
    ]
)


@dataclass(frozen=True)
class ScoringSettings:
    """What every scoring actor is told."""

    model: Location
    output: Output
    run_id: str
    keep_maps: bool
    false_positive_rate: float
    batch_size: int | None
    precision: PrecisionSetting = "float32"
    is_isolated: bool = False
    """Read and decode each image in a child process, since the shards' workers died before."""


class ShardScorer:
    """Actor of the scoring pass."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources) -> None:
        self._settings = settings
        self._device = device.set_up(resources.cpus, resources.gpus)
        model = load_model(settings.model)
        if model.model_id != settings.output.model_id:
            raise RuntimeError(
                f"{settings.model} holds model {model.model_id}, and {settings.output.model_id} when the run "
                "began; start the run again"
            )
        self._detector = InferenceDetector(model.detector.to(self._device), settings.precision)
        self._calibration_scores = model.calibration_scores
        self._batch_size = settings.batch_size or (GPU_BATCH_SIZE if resources.gpus else CPU_BATCH_SIZE)
        storage_options = settings.output.location.storage_options
        image_size = model.detector.architecture.image_size
        self._loader: ImageLoader | IsolatedLoader
        if settings.is_isolated:
            self._loader = IsolatedLoader(storage_options, image_size)
        else:
            self._loader = ImageLoader(ImageReader(storage_options), image_size, READ_THREADS)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Scores the one shard in the batch; returns a row in the `RESULT` schema."""
        storage_options = self._settings.output.location.storage_options
        shard = PlannedShard.from_row({name: column[0] for name, column in batch.items()}, storage_options)
        row: dict[str, Any] = {"shard": shard.name, "is_published": False}
        try:
            target = self._settings.output.scores_file(shard.name, shard.date)
            if not target.exists():
                row |= self._score_shard(shard, target)
        except Exception as error:
            # What fails here is no image: a full disk, a refused write, a device. The run tells its user.
            row["failure"] = f"{type(error).__name__}: {error}"
        return pa.Table.from_pylist([row], schema=RESULT)

    def _score_shard(self, shard: PlannedShard, target: Location) -> dict[str, Any]:
        images = shard.images()
        seconds: dict[str, float] = defaultdict(float)
        rows: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        loaded = self._loader.load(images["image_uri"].to_pylist(), images["image_version"].to_pylist())
        for group in batches(_timed(loaded, seconds), self._batch_size):
            errors += [self._error_row(image) for image in group if isinstance(image.content, ImageError)]
            good = [(image, image.content) for image in group if isinstance(image.content, DecodedImage)]
            if good:
                rows += self._score(good, seconds)
        started = time.perf_counter()
        is_published = self._publish(shard, target, rows, errors)
        seconds["write"] += time.perf_counter() - started
        return {
            "images": images.num_rows,
            "scored": len(rows),
            "anomalous": sum(row["is_anomalous"] for row in rows),
            "error_codes": list(Counter(row["error_code"] for row in errors).items()),
            "is_published": is_published,
            "seconds": list(seconds.items()),
            "anomaly_scores": [row["anomaly_score"] for row in rows],
            "p_values_below_5_percent": sum(row["p_value"] < 0.05 for row in rows),
            "precision": self._detector.precision,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _score(
        self, images: list[tuple[LoadedImage, DecodedImage]], seconds: dict[str, float]
    ) -> Iterator[dict[str, Any]]:
        pixels_BHWC = torch.from_numpy(np.stack([decoded.pixels_HWC for _, decoded in images]))
        started = time.perf_counter()
        scores = self._forward(pixels_BHWC)
        seconds["score"] += time.perf_counter() - started
        anomaly_scores = scores.anomaly_score_B.double().numpy()
        scale_scores, anomaly_maps = scores.scale_scores_BS.numpy(), scores.anomaly_map_BHW.numpy()
        p = p_values(anomaly_scores, self._calibration_scores)
        scored_at = datetime.now(UTC)
        for i, (image, decoded) in enumerate(images):
            map_height, map_width = anomaly_maps[i].shape
            peak_y, peak_x = peak(anomaly_maps[i], decoded.height, decoded.width)
            yield {
                "image_uri": image.image_uri,
                "image_version": image.image_version,
                "image_height": decoded.height,
                "image_width": decoded.width,
                "anomaly_score": anomaly_scores[i],
                "scale_scores": scale_scores[i],
                "p_value": p[i],
                "is_anomalous": bool(p[i] <= self._settings.false_positive_rate),
                "anomaly_map": anomaly_maps[i].ravel() if self._settings.keep_maps else None,
                "map_height": map_height,
                "map_width": map_width,
                "peak_y": peak_y,
                "peak_x": peak_x,
                "run_id": self._settings.run_id,
                "scored_at": scored_at,
            }

    @torch.inference_mode()
    def _forward(self, pixels_BHWC: Tensor) -> Scores:
        """Scores on the CPU. A batch too large for the device is halved, as often as needed."""
        try:
            return Scores(*(value.cpu() for value in self._detector(pixels_BHWC.to(self._device))))
        except torch.OutOfMemoryError:
            if len(pixels_BHWC) == 1:
                raise
        halves = [self._forward(half) for half in pixels_BHWC.chunk(2)]
        return Scores(*(torch.cat(parts) for parts in zip(*halves, strict=True)))

    def _error_row(self, image: LoadedImage) -> dict[str, Any]:
        assert isinstance(image.content, ImageError)
        return {
            "image_uri": image.image_uri,
            "image_version": image.image_version,
            "error_code": str(image.content.code),
            "error_message": image.content.message,
            "is_transient": image.content.is_transient,
            "run_id": self._settings.run_id,
            "failed_at": datetime.now(UTC),
        }

    def _publish(
        self, shard: PlannedShard, target: Location, rows: list[dict[str, Any]], errors: list[dict[str, Any]]
    ) -> bool:
        """Writes the errors, then creates the scores file, which finishes the shard, also without rows.

        Returns False if another attempt at this shard finished it first; its rows stand.
        """
        output = self._settings.output
        if errors:
            table = pa.Table.from_pylist(errors, schema=ERRORS)
            output.errors_file(shard.name, shard.date, table).write(to_parquet(table))
        try:
            target.create(to_parquet(pa.Table.from_pylist(rows, schema=SCORES)))
        except FileExistsError:
            return False
        return True


def peak(anomaly_map_HW: NDArray[np.float32], image_height: int, image_width: int) -> tuple[float, float]:
    """Centre (y, x) of the map's hottest cell, in pixels of the original image."""
    row, column = np.unravel_index(anomaly_map_HW.argmax(), anomaly_map_HW.shape)
    map_height, map_width = anomaly_map_HW.shape
    return (float(row) + 0.5) * image_height / map_height, (float(column) + 0.5) * image_width / map_width


def _timed(images: Iterator[LoadedImage], seconds: dict[str, float]) -> Iterator[LoadedImage]:
    for image in images:
        seconds["read"] += image.read_seconds
        seconds["decode"] += image.decode_seconds
        yield image
