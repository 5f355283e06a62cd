"""Processor time of a whole scoring job, S3 to Parquet, by stage.

    python benchmarks/stages.py --images 20000

What is neither reading, decoding, model nor writing is what csflow and Ray add.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import plant
import results

STAGES = {"read": "read", "decode": "decode", "score": "model", "write": "write"}


def table(run: plant.Run, record: dict) -> str:
    """Markdown: seconds of CPU, share of the job's, and milliseconds per image."""
    images = record["counts"]["scored_in_this_run"]
    workers = record["cpu_seconds_in_workers"]
    rows = {name: workers[stage] for stage, name in STAGES.items()}
    rows["start of the workers: imports, model"] = workers["start"]
    rows["rest of the workers"] = run.cpu_seconds["scoring workers"] - sum(rows.values())
    rows["driver: imports, listing, plan, account"] = run.cpu_seconds["driver"]
    rows["Ray's own processes"] = run.cpu_seconds["Ray"]
    total = sum(rows.values())
    added = total - sum(workers[stage] for stage in STAGES)
    lines = ["| stage | CPU seconds | share | ms an image |", "|---|---|---|---|"]
    for name, seconds in [
        *rows.items(),
        ("**sum**", total),
        ("**neither read, decode, model nor write**", added),
    ]:
        lines.append(f"| {name} | {seconds:.1f} | {seconds / total:.1%} | {1000 * seconds / images:.2f} |")
    lines.append(f"| not counted: the S3 server | {run.cpu_seconds['S3 server']:.1f} | | |")
    steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in record["seconds"].items())
    lines += [
        "",
        f"{images} images, {record['images_per_second']:.1f} images/s while scoring, {run.seconds:.0f} s "
        f"for the command, of which {record['seconds_to_first_image']:.1f} s to the first scored image. "
        f"Steps on the clock: {steps}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--setting", choices=plant.SETTINGS, default="light")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="csflow-stages-"))
    try:
        model = plant.write_model(folder / "model", plant.SETTINGS[arguments.setting])
        with plant.s3_server() as server:
            images = server.put_photographs("night", arguments.images)
            output = plant.fresh(folder)
            run = plant.run(plant.score_command(model, images, output), server)
        command = f"python benchmarks/stages.py --setting {arguments.setting} --images {arguments.images}"
        title = f"Processor time by stage: {arguments.setting} settings, S3 to Parquet"
        results.record(title, table(run, plant.run_record(output)), command)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
