"""From a scoring command to its first scores: seconds on the clock and of processors.

    python benchmarks/startup.py
    python benchmarks/startup.py --before v0.2.0

Each round runs the job once with an empty cache folder, as on a new node, and once more, as on every later
night; with `--before` also that commit, in a worktree. Medians of the rounds are printed; a first round,
which is not counted, warms the file cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import plant
import results

IMAGES = 128
COLUMNS = {
    "first": "s to the first scores",
    "whole": "s of the command",
    "driver": "driver: CPU s",
    "Ray": "Ray: CPU s",
    "start": "start of the workers: CPU s",
}


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of a commit."""
    git = ["git", "-C", str(plant.ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), commit], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def measure(root: Path, model: Path, images: str, folder: Path, server: plant.S3Server) -> dict[str, float]:
    """One run of the job of a source tree."""
    output = plant.fresh(folder)
    run = plant.run(plant.score_command(model, images, output), server, root)
    record = plant.run_record(output)
    return {
        "first": record["seconds_to_first_image"],
        "whole": run.seconds,
        "start": record["cpu_seconds_in_workers"]["start"],
    } | {kind: run.cpu_seconds[kind] for kind in ("driver", "Ray")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=plant.SETTINGS, default="light")
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="csflow-startup-") as temporary, plant.s3_server() as server:
        folder = Path(temporary)
        model = plant.write_model(folder / "model", plant.SETTINGS[arguments.setting])
        images = server.put_photographs("night", IMAGES)

        def take_turns(before: Path | None) -> None:
            for number in range(arguments.rounds + 1):
                os.environ["XDG_CACHE_HOME"] = str(plant.fresh(folder))
                turns = {arguments.before: before} if before else {}
                turns |= {"now, on a new node": plant.ROOT, "now, later": plant.ROOT}
                for name, root in turns.items():
                    figures = measure(root, model, images, folder, server)
                    if number:
                        rows[name].append(figures)
                print(f"{number} of {arguments.rounds} rounds", file=sys.stderr, flush=True)

        if arguments.before:
            with checkout(arguments.before, folder / "before") as before:
                take_turns(before)
        else:
            take_turns(None)
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for name, runs in rows.items():
        figures = [f"{median(run[column] for run in runs):.1f}" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    command = f"python benchmarks/startup.py --setting {arguments.setting} --rounds {arguments.rounds}"
    if arguments.before:
        command += f" --before {arguments.before}"
    body = "\n".join([*lines, "", f"{IMAGES} images, {arguments.rounds} rounds."])
    results.record(f"Start-up: {arguments.setting} settings", body, command)


if __name__ == "__main__":
    main()
