"""The models of a scoring actor: loads each when its first shards come, and keeps the last few."""

import gc
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pyarrow as pa

from csflow.cluster import WorkerResources
from csflow.redaction import redact
from csflow.scoring.config import ScoringSettings
from csflow.scoring.scorer import RESULT, ShardScorer, WorkerProcess


class ModelNotLoaded(Exception):
    """A model cannot be loaded here; the message says why."""


class KeptModels:
    """Scores groups of shards, each of one model. Several threads call it at once.

    A model that no call uses is dropped when another is needed. If calls use all that may be kept, the next
    call waits: memory is bounded by so many models, whatever comes.
    """

    scorer: ClassVar[type[ShardScorer]] = ShardScorer

    def __init__(self, settings: Sequence[ScoringSettings], resources: WorkerResources, most: int) -> None:
        """Loads the model if there is but one, so that an actor that cannot load it does not start.

        Args:
            settings: those of each model.
            most: number of models to keep.
        """
        self._settings = {some.output.model_id: some for some in settings}
        self._resources = resources
        self._most = most
        self._process = WorkerProcess(resources)
        self._changed = threading.Condition()
        self._kept: dict[str, ShardScorer] = {}
        """The models that are loaded, the one that was used last at the end."""
        self._users: Counter[str] = Counter()
        self._broken: dict[str, str] = {}
        self._loads = 0
        if len(settings) == 1:
            self._kept = {settings[0].output.model_id: self._load(settings[0])}

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Scores the group of shards in the batch; returns a row in the `RESULT` schema for each."""
        rows = json.loads(batch["shards"][0])
        model_id = rows[0]["model_id"]
        try:
            with self._in_use(model_id) as scorer:
                results = [scorer({name: [value] for name, value in row.items()}) for row in rows]
        except ModelNotLoaded as error:
            lost = {"model_id": model_id, "is_published": False, "is_of_model": True, "failure": str(error)}
            results = [pa.Table.from_pylist([lost | {"shard": row["name"]} for row in rows], schema=RESULT)]
        table = pa.concat_tables(results)
        loads = pa.array([self._take_loads()] + [0] * (table.num_rows - 1), pa.int64())
        return table.set_column(table.schema.get_field_index("loads"), "loads", loads)

    @contextmanager
    def _in_use(self, model_id: str) -> Iterator[ShardScorer]:
        """The model, which stays in memory meanwhile. Raises ModelNotLoaded."""
        with self._changed:
            self._users[model_id] += 1
            try:
                self._changed.wait_for(lambda: self._has_room(model_id))
                # Loaded under the lock: another call for this model waits for it, and does not load it again.
                scorer = self._kept.pop(model_id, None) or self._load(self._settings[model_id])
                self._kept[model_id] = scorer
            except BaseException:
                self._leave(model_id)
                raise
        try:
            yield scorer
        finally:
            with self._changed:
                self._leave(model_id)

    def _has_room(self, model_id: str) -> bool:
        """Whether the model is kept, or can be; drops models that are not in use."""
        if model_id in self._kept:
            return True
        for unused in [other for other in self._kept if not self._users[other]]:
            if len(self._kept) < self._most:
                break
            del self._kept[unused]
            gc.collect()
        return len(self._kept) < self._most

    def _leave(self, model_id: str) -> None:
        self._users[model_id] -= 1
        self._changed.notify_all()

    def _load(self, settings: ScoringSettings) -> ShardScorer:
        model_id = settings.output.model_id
        if model_id in self._broken:
            raise ModelNotLoaded(self._broken[model_id])
        self._loads += 1
        try:
            return self.scorer(settings, self._resources, self._process)
        except Exception as error:
            options = settings.output.location.storage_options
            self._broken[model_id] = redact(f"{type(error).__name__}: {error}", options)
            raise ModelNotLoaded(self._broken[model_id]) from error

    def _take_loads(self) -> int:
        with self._changed:
            loads, self._loads = self._loads, 0
            return loads
