"""Scores shards with a pool of actors, until all are scored or a run is to stop early."""

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from csflow.cluster import SHARD_RETRIES, WorkerResources, has_room, map_shards, with_timeout
from csflow.console import Progress, warn
from csflow.scoring.actor import ScoringActor, calls_per_scorer
from csflow.scoring.config import ScoreConfig, ScoringSettings
from csflow.scoring.grouping import grouped
from csflow.scoring.heartbeat import Heartbeat
from csflow.scoring.plan_log import PlannedShard
from csflow.scoring.stopping import StopRules
from csflow.scoring.tally import LiveMetrics, Tally


class ScoringPool:
    """Scores the shards of one or many models with one pool of actors, and adds up what these tell."""

    def __init__(
        self,
        config: ScoreConfig,
        settings: Sequence[ScoringSettings],
        shards: Sequence[PlannedShard],
        resources: WorkerResources,
        tally: Tally,
        tallies: Mapping[str, Tally],
        heartbeat: Heartbeat,
    ) -> None:
        """
        Args:
            settings: those of each model.
            shards: those of a model stand together.
            tally: adds up everything.
            tallies: add up what is of each model, by its id.
        """
        self._config = config
        self._settings = settings
        self._shards = shards
        self._resources = resources
        self._tally = tally
        self._tallies = tallies
        self._heartbeat = heartbeat

    def score(self) -> None:
        """Scores the shards; then those again that were lost with their workers: once as before, since a node
        may have gone, and then image by image in a child process, since an image may take its process down.

        Raises:
            Failed: as `StopRules`.
        """
        calls = calls_per_scorer(self._resources, any(some.is_tiled for some in self._settings))
        is_to_go_on = self._score(self._shards, calls, is_first=True)
        if is_to_go_on and (again := self._lost()):
            warn(f"{len(again)} shards were lost with their workers; they are tried again")
            is_to_go_on = self._score(again, retries=0)
        if is_to_go_on and (again := self._lost()):
            warn(f"{len(again)} shards took their workers down again; their images are now tried one by one")
            self._settings = [replace(some, is_isolated=True) for some in self._settings]
            self._score(again)

    def _lost(self) -> list[PlannedShard]:
        return [shard for shard in self._shards if (shard.model_id, shard.name) not in self._tally.shards]

    def _score(
        self,
        shards: Sequence[PlannedShard],
        calls: int = 1,
        retries: int = SHARD_RETRIES,
        is_first: bool = False,
    ) -> bool:
        """Scores these shards; returns whether all came back."""
        awaited = self._resources if is_first and not has_room(self._resources) else None
        groups = grouped(shards, self._resources.workers) if is_first else ([shard] for shard in shards)
        work = [{"shards": json.dumps([shard.to_row() for shard in group])} for group in groups]
        arguments = [self._settings, self._resources, self._config.models_kept]
        rows = map_shards(work, ScoringActor, arguments, self._resources, calls, retries)
        return self._follow(self._heartbeat.over(rows), awaited)

    def _follow(self, rows: Generator[dict[str, Any], None, None], awaited: WorkerResources | None) -> bool:
        """Counts results as they arrive, shows progress; returns whether all arrived. Raises as `StopRules`.

        Args:
            awaited: what the first worker is to have, if the cluster has no room for it yet.
        """
        config, tally, shards = self._config, self._tally, len(self._shards)
        metrics, rules = LiveMetrics(), StopRules(shards, config.max_error_rate)
        progress = Progress(shards, "shards")
        try:
            for row in with_timeout(rows, config.stall_timeout, config.start_timeout if awaited else None):
                self._add(row)
                if row["began_at"]:
                    progress.work_began(row["began_at"])
                metrics.add(row)
                if line := tally.range_use.warning():
                    warn(line)
                if row["is_of_model"]:
                    continue
                if row["failure"]:
                    warn(f"shard {row['shard']} failed: {row['failure']}")
                if reason := rules.reason(tally, row["failure"]):
                    warn(f"stopped: {reason}")
                    return False
                rate = tally.images / progress.seconds
                progress.update(
                    len(tally.shards), f"{tally.scored} scored  {tally.errors} errors  {rate:.1f} images/s"
                )
        except TimeoutError:
            waiting = shards - len(tally.shards)
            if awaited and not tally.shards:
                warn(
                    f"no worker came within {config.start_timeout:.0f} s: the cluster had no node with "
                    f"{awaited.cpus} CPUs and {awaited.gpus} GPUs; `ray status` shows what its autoscaler "
                    "does"
                )
            else:
                warn(
                    f"stalled: no shard finished for {config.stall_timeout:.0f} s, {waiting} are still "
                    "waited for"
                )
            return False
        finally:
            progress.close()
        return True

    def _add(self, row: dict[str, Any]) -> None:
        """Counts a result, and says once if it is that a model cannot be loaded."""
        of_model = self._tallies[row["model_id"]]
        if row["is_of_model"] and not of_model.without_model:
            (model,) = (some.model for some in self._settings if some.output.model_id == row["model_id"])
            warn(f"model {model} cannot be loaded, its images are left: {row['failure']}")
        self._tally.add(row)
        of_model.add(row)
