"""The scoring runs of an output as Prometheus metrics, from the files that they leave there.

    python cluster/run_metrics.py s3://plant/scores --name nightly --port 9108    # served
    python cluster/run_metrics.py s3://plant/scores --name nightly > csflow.prom  # textfile collector

These files tell the truth about nights whatever became of the driver, the head and the cluster. Ray's own
metrics end with the cluster, and outlive their job. `--config` takes the output from the settings of scoring.
"""

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from csflow.console import complain, warn
from csflow.errors import ExitStatus, WrongUse
from csflow.flags import FlagParser
from csflow.output.layout import run_ids, run_started_at
from csflow.output.runs import RunRecord, read_progress, read_record
from csflow.redaction import redact
from csflow.storage import Location

REREAD_SECONDS = 60.0
"""Scrapes that are closer together get the same answer: each answer costs some requests to the store."""
RUNS_BACK = 100
"""How many runs back the last one that was done is looked for."""
HELP = {
    "csflow_output_readable": "1 if the runs could be read; otherwise all others are as of before.",
    "csflow_run_last_done_timestamp_seconds": "End of the latest run with exit status 0 or 4; 0 without one.",
    "csflow_run_open": "1 if the latest run has no record: it is at work, or was cut off.",
    "csflow_run_started_timestamp_seconds": "When the latest run began.",
    "csflow_run_progress_timestamp_seconds": "When the latest run last got something done.",
    "csflow_run_progress_ratio": "Share of its shards that are done.",
    "csflow_run_ended_timestamp_seconds": "When the latest run with a record ended; so are all below.",
    "csflow_run_duration_seconds": "How long it took.",
    "csflow_run_exit_status": "0 done, 3 incomplete, 4 drifted.",
    "csflow_run_images": "Images of its listing, by state at its end.",
    "csflow_run_errors": "Errors of this run, by code.",
    "csflow_run_images_per_second": "Its rate while scoring.",
    "csflow_run_stage_seconds": "Seconds of its workers, by stage.",
    "csflow_run_low_p_value_share": "Share of its p-values below 0.05; 0.05 without drift and defects.",
    "csflow_run_drift_distance": "Distance of its scores from calibration, 0 to 1 (Kolmogorov-Smirnov).",
    "csflow_run_drift_verdict": "1 for its verdict: like, few, unlike, higher, lower (docs/calibration.md).",
}

Sample = tuple[str, Mapping[str, str], float]


class Runs:
    """What an output tells of its runs. Records are read once, since they do not change."""

    def __init__(self, output: Location) -> None:
        self._output = output
        self._records: dict[str, RunRecord] = {}

    def samples(self) -> Iterator[Sample]:
        """All metrics. Raises what the store's client raises if it cannot be read."""
        ids = run_ids(self._output)[-RUNS_BACK:]
        yield from _of_ended([record for record in map(self._record, ids) if record])
        if ids and (started := run_started_at(ids[-1])):
            yield from self._of_latest(ids[-1], started)

    def _record(self, run_id: str) -> RunRecord | None:
        if run_id not in self._records and (record := read_record(self._output, run_id)):
            self._records[run_id] = record
        return self._records.get(run_id)

    def _of_latest(self, run_id: str, started: datetime) -> Iterator[Sample]:
        progress = read_progress(self._output, run_id)
        updated = progress.updated_at if progress else started
        yield "csflow_run_open", {}, self._record(run_id) is None
        yield "csflow_run_started_timestamp_seconds", {}, started.timestamp()
        yield "csflow_run_progress_timestamp_seconds", {}, updated.timestamp()
        if progress and progress.of:
            yield "csflow_run_progress_ratio", {}, progress.done / progress.of


def _of_ended(records: Sequence[RunRecord]) -> Iterator[Sample]:
    """Metrics of the latest run and of the latest that was done, among records with the oldest first."""
    done = [record for record in records if record.exit_status in (ExitStatus.DONE, ExitStatus.DRIFT)]
    yield "csflow_run_last_done_timestamp_seconds", {}, done[-1].ended_at.timestamp() if done else 0
    if not records:
        return
    latest = records[-1]
    # A run with routes has a series for each of its models, and its own have no model.
    whole = {"model_id": latest.model.model_id if latest.model else ""}
    for name, labels, value in _of_run(latest):
        yield name, {**whole, **labels}, value
    for one in latest.by_model():
        for name, labels, value in _of_model(one):
            yield name, {"model_id": one.model.model_id, **labels}, value


def _of_run(record: RunRecord) -> Iterator[Sample]:
    yield "csflow_run_ended_timestamp_seconds", {}, record.ended_at.timestamp()
    yield "csflow_run_duration_seconds", {}, (record.ended_at - record.started_at).total_seconds()
    yield "csflow_run_exit_status", {}, record.exit_status
    yield "csflow_run_images_per_second", {}, record.images_per_second
    for stage, seconds in record.seconds_in_workers.items():
        yield "csflow_run_stage_seconds", {"stage": stage}, seconds


def _of_model(record: RunRecord) -> Iterator[Sample]:
    counts = record.counts
    yield "csflow_run_images", {"state": "listed"}, counts.listed
    yield "csflow_run_images", {"state": "scored"}, counts.scored
    yield "csflow_run_images", {"state": "permanent_errors"}, counts.permanent_errors
    yield "csflow_run_images", {"state": "missing"}, counts.missing
    for code, images in counts.errors_in_this_run.items():
        yield "csflow_run_errors", {"code": code}, images
    if record.drift:  # shares of groups are of few images, and would alarm by chance
        yield "csflow_run_low_p_value_share", {}, record.drift.share_below_5_percent
    # Of all scores the label `group` is empty.
    for group, drift in {"": record.drift, **record.drift_by_group}.items():
        if drift:
            yield "csflow_run_drift_distance", {"group": group}, drift.ks_statistic
            if drift.verdict:
                yield "csflow_run_drift_verdict", {"group": group, "verdict": drift.verdict}, 1


class RunCollector(Collector):
    """Answers scrapes. If the store cannot be read, the answer is that of before, and says so."""

    def __init__(self, name: str, runs: Runs) -> None:
        self._name, self._runs = name, runs
        self._samples: list[Sample] = []
        self._is_readable = False
        self._read_at = float("-inf")
        self._lock = threading.Lock()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._lock:
            if time.monotonic() - self._read_at > REREAD_SECONDS:
                self._read()
            samples: list[Sample] = [*self._samples, ("csflow_output_readable", {}, self._is_readable)]
        families: dict[str, GaugeMetricFamily] = {}
        for metric, labels, value in samples:
            family = GaugeMetricFamily(metric, HELP[metric], labels=["name", *labels])
            families.setdefault(metric, family).add_metric([self._name, *labels.values()], value)
        yield from families.values()

    def _read(self) -> None:
        self._read_at = time.monotonic()
        try:
            self._samples = list(self._runs.samples())
            self._is_readable = True
        except Exception as error:  # object stores' errors have no common base
            warn(redact(f"the runs cannot be read: {type(error).__name__}: {error}"))
            self._is_readable = False


def main(words: Sequence[str]) -> int:
    """Runs the command line of this script; returns the exit status."""
    parser = FlagParser(prog="run_metrics.py", description=__doc__)
    parser.add_argument("output", nargs="?", help="The --output of scoring.")
    parser.add_argument("--config", metavar="FILE", help="The settings of scoring, which name the output.")
    parser.add_argument("--name", required=True, help="What alerts call it, such as nightly.")
    parser.add_argument("--port", type=int, metavar="N", help="Serve at this port. [default: print once]")
    try:
        options = parser.parse(words)
        output = _output(options)
    except WrongUse as error:
        complain(redact(str(error)))
        return ExitStatus.WRONG_USE
    registry = CollectorRegistry()
    registry.register(RunCollector(options["name"], Runs(output)))
    if "port" in options:
        _, thread = start_http_server(options["port"], registry=registry)
        thread.join()
    sys.stdout.write(generate_latest(registry).decode())
    return ExitStatus.DONE


def _output(options: Mapping[str, str]) -> Location:
    if ("output" in options) == ("config" in options):
        raise WrongUse("give either the output, or --config with the settings that name it")
    if "output" in options:
        return Location(options["output"])
    try:
        return Location(yaml.safe_load(Path(options["config"]).read_text())["output"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise WrongUse(f"--config {options['config']} names no output ({error!r})") from None


if __name__ == "__main__":
    sys.exit(int(main(sys.argv[1:])))
