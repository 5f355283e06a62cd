"""The latest scoring run of an output as Prometheus metrics, for alerts that outlive the cluster.

    python cluster/dashboards/run_metrics.py s3://plant/scores --name nightly \\
        | curl --fail --data-binary @- http://pushgateway:9091/metrics/job/csflow

Or write it to a file in the folder of node_exporter's textfile collector. Ray's own metrics end with the
cluster, and a run that never began has none.
"""

import argparse
from collections.abc import Iterator, Mapping

from csflow.output.layout import run_ids
from csflow.output.runs import RunRecord, read_record
from csflow.storage import Location

Sample = tuple[str, Mapping[str, str], float]
HELP = {
    "csflow_run_ended_timestamp_seconds": "When the latest run ended.",
    "csflow_run_duration_seconds": "How long it took.",
    "csflow_run_exit_status": "0 done, 1 failed, 3 incomplete, 4 drifted.",
    "csflow_run_images": "Images of its listing, by state at its end.",
    "csflow_run_errors": "Errors of this run, by code.",
    "csflow_run_images_per_second": "Its rate while scoring.",
    "csflow_run_stage_seconds": "Seconds of its workers, by stage.",
    "csflow_run_low_p_value_share": "Share of its p-values below 0.05; 0.05 without drift and defects.",
    "csflow_run_drift_distance": "Distance of its scores from calibration, 0 to 1 (Kolmogorov-Smirnov).",
}


def latest_record(output: Location) -> RunRecord | None:
    """That of the newest run that has ended."""
    records = (read_record(output, run_id) for run_id in reversed(run_ids(output)))
    return next((record for record in records if record), None)


def samples(record: RunRecord) -> Iterator[Sample]:
    """The metrics of a run's record."""
    yield "csflow_run_ended_timestamp_seconds", {}, record.ended_at.timestamp()
    yield "csflow_run_duration_seconds", {}, (record.ended_at - record.started_at).total_seconds()
    yield "csflow_run_exit_status", {}, record.exit_status
    counts = record.counts
    yield "csflow_run_images", {"state": "listed"}, counts.listed
    yield "csflow_run_images", {"state": "scored"}, counts.scored
    yield "csflow_run_images", {"state": "permanent_errors"}, counts.permanent_errors
    yield "csflow_run_images", {"state": "missing"}, counts.missing
    for code, images in counts.errors_in_this_run.items():
        yield "csflow_run_errors", {"code": code}, images
    yield "csflow_run_images_per_second", {}, record.images_per_second
    for stage, seconds in record.seconds_in_workers.items():
        yield "csflow_run_stage_seconds", {"stage": stage}, seconds
    if record.drift:
        yield "csflow_run_low_p_value_share", {}, record.drift.share_below_5_percent
        yield "csflow_run_drift_distance", {}, record.drift.ks_statistic


def exposition(name: str, record: RunRecord) -> str:
    """Prometheus' text format. The labels are the name of the input and the model."""
    labels = {"name": name, "model_id": record.model.model_id}
    lines: list[str] = []
    for metric, own_labels, value in samples(record):
        if f"# TYPE {metric} gauge" not in lines:
            lines += [f"# HELP {metric} {HELP[metric]}", f"# TYPE {metric} gauge"]
        shown = ",".join(f'{label}="{text}"' for label, text in (labels | dict(own_labels)).items())
        lines.append(f"{metric}{{{shown}}} {float(value):.15g}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="the --output of jobs/score.py")
    parser.add_argument("--name", required=True, help="what the alerts call it, such as nightly")
    arguments = parser.parse_args()
    record = latest_record(Location(arguments.output))
    if record is None:
        raise SystemExit(f"error: no run has ended in {arguments.output}")
    print(exposition(arguments.name, record), end="")
