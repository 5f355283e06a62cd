"""The scoring actor: reads, decodes and scores one shard of images, and publishes its rows."""

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from csflow import process
from csflow.cluster import WorkerResources, helpers
from csflow.errors import ImageError
from csflow.forms import Forms
from csflow.inputs.isolation import IsolatedLoader
from csflow.inputs.loaded import HELPED, LoadedImage
from csflow.inputs.loading import ImageLoader, LoaderSettings, batches
from csflow.model import CpuBackbone, Scores, TiledDetector, default_batch_size
from csflow.model_directory import read_model
from csflow.output.schemas import ERRORS, SCORES
from csflow.process import ProcessCpu, Stages, peak_memory_bytes
from csflow.redaction import redact
from csflow.scoring.config import ScoringSettings
from csflow.scoring.plan_log import PlannedShard
from csflow.scoring.rows import (
    RegionRule,
    ScorableImage,
    Tags,
    error_row,
    judge,
    require_scores,
    score_rows,
)
from csflow.storage import Location, to_parquet

READ_THREADS, READ_THREADS_PER_CPU = 8, 2
"""Number of reading threads in a worker: at least the first, since most of them wait for the store."""
RESULT = pa.schema(
    [
        pa.field("model_id", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("images", pa.int64()),
        pa.field("scored", pa.int64()),
        pa.field("anomalous", pa.int64()),
        pa.field("helped", pa.int64()),  # images that helpers loaded
        pa.field("deep", pa.int64()),  # images of more than 8 bits a sample
        pa.field("range_used", pa.float64()),  # by the brightest of these, as a share
        pa.field("error_codes", pa.map_(pa.string(), pa.int64())),
        pa.field("is_published", pa.bool_()),  # false if another attempt was first
        pa.field("seconds", pa.map_(pa.string(), pa.float64())),  # by stage, summed over threads
        # Of the threads of each stage; `start` and `other` are the rest, so that all rows add up.
        pa.field("cpu_seconds", pa.map_(pa.string(), pa.float64())),
        pa.field("began_at", pa.timestamp("us", tz="UTC")),
        pa.field("first_scored_at", pa.timestamp("us", tz="UTC")),
        pa.field("anomaly_scores", pa.list_(pa.float64())),
        pa.field("global_scores", pa.list_(pa.float64())),
        pa.field("groups", pa.list_(pa.string())),  # of the scores; empty if the model has no groups
        pa.field("p_values_below_5_percent", pa.int64()),
        pa.field("form", pa.string()),  # of the worker's model, as JSON
        pa.field("peak_memory_bytes", pa.int64()),  # of the worker process so far
        pa.field("failure", pa.string()),  # why the whole shard failed, if it did
        pa.field("is_of_model", pa.bool_()),  # whether that is because its model cannot be loaded
        pa.field("loads", pa.int64()),  # by the actor since its last row
    ]
)


@dataclass
class _Notes:
    """What is noted while a shard is scored."""

    stages: Stages = field(default_factory=Stages)
    planned: Mapping[str, tuple[datetime | None, Tags | None]] = field(default_factory=dict)
    """When each image was last changed, and its tags, by URI."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    """Rows of images that cannot be scored."""
    helped: int = 0
    """Number of images that helpers loaded."""
    ranges_used: list[float] = field(default_factory=list)
    """Of images of more than 8 bits a sample."""


class WorkerProcess:
    """What the models of an actor share: its device, the turn to compute, compiled backbones, and the account
    of its CPU time."""

    def __init__(self, resources: WorkerResources) -> None:
        self.device = process.set_up(resources.cpus, resources.gpus)
        self.turn = threading.Lock()
        self.backbones: WeakValueDictionary[str, CpuBackbone] = WeakValueDictionary()
        self.cpu = ProcessCpu()


class ShardScorer:
    """The scoring pass in an actor. Several threads call it at once.

    The earlier shard has the model to itself; the other shard uses the model only while the earlier one waits
    for input. So the two do not reach their ends at the same time, when neither would have work for the
    model.
    """

    def __init__(
        self, settings: ScoringSettings, resources: WorkerResources, worker: WorkerProcess | None = None
    ) -> None:
        """Loads the model.

        Args:
            worker: what it shares with other models in this process.
        """
        self._settings = settings
        worker = worker or WorkerProcess(resources)
        self._device = worker.device
        model = read_model(settings.model)
        if model.model_id != settings.output.model_id:
            raise RuntimeError(
                f"{settings.model} holds model {model.model_id}, and {settings.output.model_id} when the run "
                "began; start the run again"
            )
        self._model_name = model.name
        self._calibration = model.calibration
        self._map_threshold = model.calibration.map_threshold(settings.false_positive_rate)
        self._region_rule = RegionRule.of(model.calibration, settings.false_regions)
        storage_options = settings.output.location.storage_options
        preprocessing = model.preprocessing
        batch_size = settings.batch_size or default_batch_size(preprocessing.image_size, self._device)
        self._detector = Forms(model, settings.precision, self._device, worker.backbones).form(batch_size)
        self._tiled = TiledDetector(self._detector) if preprocessing.tiling else None
        self._loader: ImageLoader | IsolatedLoader
        if settings.is_isolated:
            self._loader = IsolatedLoader(storage_options, preprocessing, settings.limits)
        else:
            threads = max(READ_THREADS, READ_THREADS_PER_CPU * resources.cpus)
            loader = LoaderSettings(storage_options, preprocessing, limits=settings.limits)
            self._loader = loader.loader(threads, helpers(loader, resources))
        self._model_lock = worker.turn
        self._process_cpu = worker.cpu
        self._start_cpu_seconds = self._process_cpu.take()[0]

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Scores the one shard in the batch; returns a row in the `RESULT` schema."""
        storage_options = self._settings.output.location.storage_options
        shard = PlannedShard.from_row({name: column[0] for name, column in batch.items()}, storage_options)
        row: dict[str, Any] = {"model_id": self._settings.output.model_id, "shard": shard.name}
        row |= {"is_published": False, "is_of_model": False, "loads": 0}
        try:
            target = self._settings.output.scores_file(shard.name, shard.date)
            if not target.exists():
                row |= self._score_shard(shard, target)
        except Exception as error:
            # What fails here is no image: a full disk, a refused write, a device. The run tells its user.
            row["failure"] = redact(f"{type(error).__name__}: {error}", storage_options)
        return pa.Table.from_pylist([row], schema=RESULT)

    def _score_shard(self, shard: PlannedShard, target: Location) -> dict[str, Any]:
        began_at = datetime.now(UTC)
        images = shard.images()
        uris = images["image_uri"].to_pylist()
        planned = zip(images["image_modified_at"].to_pylist(), images["tags"].to_pylist(), strict=True)
        notes = _Notes(planned=dict(zip(uris, planned, strict=True)))
        loaded = self._loader.load(
            uris,
            images["image_version"].to_pylist(),
            while_waiting=_Released(self._model_lock),
        )
        with self._model_lock:
            good = self._without_errors(loaded, notes)
            scored = [self._rows(*of_batch) for of_batch in self._scored(good, notes.stages)]
        notes.stages.seconds["wait"] += self._loader.idle.take()
        with notes.stages.measured("write"):
            scores = pa.Table.from_batches(scored, SCORES)
            is_published = self._publish(shard, target, scores, notes.errors)
        return {
            "images": images.num_rows,
            "scored": scores.num_rows,
            "anomalous": pc.sum(scores["is_anomalous"]).as_py() or 0,
            "helped": notes.helped,
            "deep": len(notes.ranges_used),
            "range_used": max(notes.ranges_used, default=0.0),
            "error_codes": list(Counter(row["error_code"] for row in notes.errors).items()),
            "is_published": is_published,
            "seconds": list(notes.stages.seconds.items()),
            "cpu_seconds": list(self._cpu_seconds(notes.stages).items()),
            "began_at": began_at,
            "first_scored_at": scores["scored_at"][0] if scores else None,
            "anomaly_scores": scores["anomaly_score"].to_pylist(),
            "global_scores": scores["global_score"].to_pylist(),
            "groups": self._groups(scores["tags"]),
            "p_values_below_5_percent": pc.sum(pc.less(scores["p_value"], 0.05)).as_py() or 0,
            "form": json.dumps(asdict(self._detector.form)),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _groups(self, tags: pa.ChunkedArray) -> list[str | None]:
        calibration = self._calibration
        if not calibration.groups:
            return []
        return [calibration.group_of(dict(of_image or {})) for of_image in tags.to_pylist()]

    def _without_errors(self, images: Iterator[LoadedImage], notes: "_Notes") -> Iterator[ScorableImage]:
        """The images that can be scored; the errors of the others are noted."""
        for image in images:
            notes.stages.add(image.stages)
            notes.helped += image.is_helped
            modified_at, tags = notes.planned[image.image_uri]
            if isinstance(image.content, ImageError):
                row = error_row(
                    image.image_uri,
                    image.image_version,
                    image.content,
                    self._settings.run_id,
                    modified_at=modified_at,
                    model_name=self._model_name,
                    tags=tags,
                )
                notes.errors.append(row)
            else:
                if image.content.range_used is not None:
                    notes.ranges_used.append(image.content.range_used)
                yield ScorableImage(image.image_uri, image.image_version, image.content, modified_at, tags)

    def _scored(
        self, images: Iterable[ScorableImage], stages: Stages
    ) -> Iterator[tuple[Sequence[ScorableImage], Scores]]:
        """The images of each batch, and their scores.

        A GPU scores one batch while this thread gathers the next and makes rows of the last.
        """
        if self._tiled:
            yield from self._joined(self._tiled, images, stages)
            return
        groups = batches(images, self._detector.form.batch_size)
        submitted: deque[tuple[Sequence[ScorableImage], Callable[[], Scores]]] = deque()
        for group in groups:
            with stages.measured("score"):
                submitted.append((group, self._detector.submit(self._pixels(group))))
            if len(submitted) > 1:
                yield _finished(*submitted.popleft(), stages)
        while submitted:
            yield _finished(*submitted.popleft(), stages)

    def _joined(
        self, detector: TiledDetector, images: Iterable[ScorableImage], stages: Stages
    ) -> Iterator[tuple[Sequence[ScorableImage], Scores]]:
        """Each image alone, scored by its tiles; the box of its pixels becomes that of its map."""
        for image in images:
            pixels_HWC, height, width = image.decoded[:3]
            with stages.measured("score"):
                scores = detector(pixels_HWC, height, width)
            box = detector.map_box(height, width)
            yield [image._replace(decoded=image.decoded._replace(box=box))], scores

    def _pixels(self, images: Sequence[ScorableImage]) -> Tensor:
        """The images' pixels (B, H, W, 3), where a GPU can fetch them by itself."""
        pixels = [image.decoded.pixels_HWC for image in images]
        shape = (len(pixels), *pixels[0].shape)
        pixels_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        np.stack(pixels, out=pixels_BHWC.numpy())
        return pixels_BHWC

    def _rows(self, images: Sequence[ScorableImage], scores: Scores) -> pa.RecordBatch:
        """Rows in the `SCORES` schema.

        Raises:
            FloatingPointError: an image has no score, since numbers left the range of the precision.
        """
        tags = [image.tags for image in images]
        judged = judge(scores, self._calibration, self._settings.false_positive_rate, tags)
        require_scores([image.image_uri for image in images], judged, self._detector.form.precision)
        return score_rows(
            images,
            judged,
            run_id=self._settings.run_id,
            keeps_maps=self._settings.keep_maps,
            map_threshold=self._map_threshold,
            region_rule=self._region_rule,
            model_name=self._model_name,
        )

    def _publish(
        self, shard: PlannedShard, target: Location, scores: pa.Table, errors: list[dict[str, Any]]
    ) -> bool:
        """Writes the errors, then creates the scores file, even without rows, which finishes the shard.

        Returns False if another attempt at this shard finished it first; the rows of that attempt stay.
        """
        output = self._settings.output
        if errors:
            table = pa.Table.from_pylist(errors, schema=ERRORS)
            output.errors_file(shard.name, shard.date, table).write(to_parquet(table))
        data = to_parquet(scores)
        try:
            target.create(data)
        except FileExistsError:
            # It may be ours: of a PUT whose answer was lost, the second try finds the first one's file.
            return target.read() == data
        return True

    def _cpu_seconds(self, stages: Stages) -> dict[str, float]:
        """CPU seconds by stage, with all else that this process has used since the last shard."""
        total, store_client = self._process_cpu.take()
        seconds = dict(stages.cpu_seconds)
        # Shards that are written go through the same client, but they are few and their images are many.
        seconds["read"] = seconds.get("read", 0.0) + store_client
        own = [spent for stage, spent in seconds.items() if not stage.startswith(HELPED)]
        seconds["other"] = total - sum(own)
        seconds["start"], self._start_cpu_seconds = self._start_cpu_seconds, 0.0
        return seconds


def _finished(
    images: Sequence[ScorableImage], result: Callable[[], Scores], stages: Stages
) -> tuple[Sequence[ScorableImage], Scores]:
    with stages.measured("score"):
        return images, result()


class _Released:
    """Releases a lock inside a `with`, so that another thread can take it. May be entered several times."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.release()

    def __exit__(self, *error: object) -> None:
        self._lock.acquire()
