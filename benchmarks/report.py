"""How long a report takes to make and to open, and how large it is.

    python benchmarks/report.py --scores demo/scores --work /tmp/many

The demo's rows and photographs are repeated, with small changes of their scores, over the days of a month
until there are enough images. Opening is timed in Chromium, from the start of navigation until the page is
loaded and painted; the median of some openings with a cold cache. On a busy machine the time of one CPU
says more than the time on the clock.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csflow.output.layout import Output
from csflow.output.reading import open_scores
from csflow.output.schemas import SCORES
from csflow.storage import Location

ROOT = Path(__file__).parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PAINTED = """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(
    () => done(performance.now()))))"""


def repeat_scores(scores: str, work: Path, images: int) -> Path:
    """An output with so many images, in a folder per day; each has a file of its own on the disk."""
    output = open_scores(Location(scores))
    table = output.scores.to_table(columns=SCORES.names)
    random = np.random.default_rng(0)
    days = [date(2026, 10, 24) + timedelta(days=day) for day in range(30)]
    drawn = random.permutation(np.arange(images) % len(table))
    for day, rows in zip(days, np.array_split(drawn, len(days)), strict=True):
        part = table.take(rows)
        folder = work / "images" / f"line{day.day % 3}" / str(day)
        uris = [_copy(uri, folder / f"{i:04}") for i, uri in enumerate(part["image_uri"].to_pylist())]
        changed = part["anomaly_score"].to_numpy() * random.normal(1, 0.02, len(part))
        part = part.set_column(0, SCORES.field("image_uri"), pa.array(uris))
        part = part.set_column(4, SCORES.field("anomaly_score"), pa.array(changed))
        target = Path(Output(Location(str(work / "out")), output.model_id).scores_file("0", str(day)).path)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, target, compression="zstd", row_group_size=256)
    shutil.copytree(Path(scores) / "_runs", work / "out" / "_runs", dirs_exist_ok=True)
    return work / "out"


def _copy(uri: str, start: Path) -> str:
    start.parent.mkdir(parents=True, exist_ok=True)
    # copy2 keeps the time of change, and so the image version.
    return str(shutil.copy2(uri, f"{start}-{Path(uri).name}"))


def open_seconds(page_file: Path, openings: int) -> float:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        seconds = []
        for _ in range(openings):
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(page_file.as_uri())
            seconds.append(page.evaluate(PAINTED) / 1000)
            page.close()
        browser.close()
    return statistics.median(seconds)


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", required=True, help="output of the demo's scoring run")
    parser.add_argument("--work", type=Path, required=True, help="folder for the repeated images")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--top", type=int, nargs="+", default=[60, 500, 1000])
    parser.add_argument("--openings", type=int, default=5)
    arguments = parser.parse_args()
    output = repeat_scores(arguments.scores, arguments.work, arguments.images)
    print("| images | shown | built, s | of one CPU, s | file, MB | opened, s |\n|---|---|---|---|---|---|")
    for top in arguments.top:
        page_file = arguments.work / f"report-{top}.html"
        command = [sys.executable, str(ROOT / "jobs" / "report.py"), "--scores", str(output)]
        command += ["--output", str(page_file), "--top", str(top)]
        started, cpu_before = time.perf_counter(), cpu_seconds()
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        built, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
        size = page_file.stat().st_size / 1e6
        opened = open_seconds(page_file, arguments.openings)
        print(
            f"| {arguments.images:,} | {top} | {built:.1f} | {cpu:.1f} | {size:.1f} | {opened:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
