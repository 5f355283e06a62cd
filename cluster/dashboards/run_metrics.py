"""The latest scoring run of an output as Prometheus metrics, for alerts that outlive the cluster.

    python cluster/dashboards/run_metrics.py s3://plant/scores --name nightly \\
        | curl --fail --data-binary @- http://pushgateway:9091/metrics/job/csflow

Or write it to a file in the folder of node_exporter's textfile collector. Ray's own metrics end with the
cluster, and a run that never began has none.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

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


def latest_run(output: Location) -> dict[str, Any] | None:
    """The newest run.json of an output; run ids sort by time."""
    records = (output / "_runs").find("/run.json")
    return json.loads(records[-1].read()) if records else None


def samples(run: Mapping[str, Any]) -> Iterator[Sample]:
    """The metrics of a run's record."""
    started, ended = (datetime.fromisoformat(run[name]) for name in ("started_at", "ended_at"))
    yield "csflow_run_ended_timestamp_seconds", {}, ended.timestamp()
    yield "csflow_run_duration_seconds", {}, (ended - started).total_seconds()
    yield "csflow_run_exit_status", {}, run["exit_status"]
    for state in ("listed", "scored", "permanent_errors", "missing"):
        yield "csflow_run_images", {"state": state}, run["counts"][state]
    for code, images in run["counts"]["errors_in_this_run"].items():
        yield "csflow_run_errors", {"code": code}, images
    yield "csflow_run_images_per_second", {}, run["images_per_second"]
    for stage, seconds in run["seconds_in_workers"].items():
        yield "csflow_run_stage_seconds", {"stage": stage}, seconds
    if drift := run["drift"]:
        yield "csflow_run_low_p_value_share", {}, drift["share_below_5_percent"]
        yield "csflow_run_drift_distance", {}, drift["ks_statistic"]


def exposition(name: str, run: Mapping[str, Any]) -> str:
    """Prometheus' text format. The labels are the name of the input and the model."""
    labels = {"name": name, "model_id": run["model"]["model_id"]}
    lines: list[str] = []
    for metric, own_labels, value in samples(run):
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
    run = latest_run(Location(arguments.output))
    if run is None:
        raise SystemExit(f"error: no run has ended in {arguments.output}")
    print(exposition(arguments.name, run), end="")
