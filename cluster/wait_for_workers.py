"""Asks an autoscaling cluster for workers, waits until they are there, and then becomes the job.

    ray job submit -- python cluster/wait_for_workers.py --workers 4 --cpus 7 --gpus 1 -- \\
        python jobs/score.py --config nightly.yaml

A job divides among its workers what the cluster has when it starts. That is nothing where workers are
started on demand. Not needed on clusters of fixed size.
"""

import argparse
import os
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group

INCOMPLETE = 3  # csflow.errors.ExitStatus: nothing is lost, the same command continues


def wait_for_workers(workers: int, cpus: int, gpus: int, timeout: float) -> bool:
    """Whether the cluster has room for so many workers of so many CPUs and GPUs each, in time.

    The demand goes with this process, however it ends; an explicit request to the autoscaler would stay.
    """
    share = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    ray.init(log_to_driver=False)
    group = placement_group([share] * workers)
    is_there = group.wait(timeout)
    remove_placement_group(group)
    ray.shutdown()
    return bool(is_there)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, required=True, help="how many to wait for")
    parser.add_argument("--cpus", type=int, required=True, help="CPUs of each")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each [default: 0]")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds [default: 1800]")
    parser.add_argument("command", nargs="+", help="the job, after --")
    a = parser.parse_args()
    if not wait_for_workers(a.workers, a.cpus, a.gpus, a.timeout):
        print(
            f"error: no room for {a.workers} workers of {a.cpus} CPUs and {a.gpus} GPUs "
            f"within {a.timeout:.0f} s; check the limits of the worker groups, and spot capacity",
            file=sys.stderr,
        )
        sys.exit(INCOMPLETE)
    print(f"{a.workers} workers of {a.cpus} CPUs and {a.gpus} GPUs can start", flush=True)
    os.execvp(a.command[0], a.command)
