"""What a night of many models costs beside one of a single model, over the same images of an S3 server.

    python benchmarks/models.py

Three models, each of a third of the images, and fifty of 100 images each. Models have the default settings
and random weights, a backbone in common, and flows of their own. Runs of one model and of several take turns.
Seconds are those from the first to the last image of a job.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import plant
import results
import yaml

FEW, MANY = 3, 50


def write_table(folder: Path, prefix: str, models: list[Path]) -> Path:
    """A table of routes by which each folder below a prefix has a model of its own."""
    rules = [
        {"name": model.name, "images": f"s3://{plant.BUCKET}/{prefix}/{number:02}/{{image}}.png"}
        | {"model": str(model)}
        for number, model in enumerate(models)
    ]
    table = folder / f"{prefix}.yaml"
    table.write_text(yaml.safe_dump({"routes": rules}))
    return table


def measure(
    server: plant.S3Server, root: Path, prefix: str, models: list[Path], images: int, rounds: int
) -> str:
    """A row of the table for one model, and one for these, over so many images."""
    for number in range(len(models)):
        server.put_photographs(f"{prefix}/{number:02}", images // len(models))
    url, table = f"s3://{plant.BUCKET}/{prefix}", write_table(root, prefix, models)
    routed = [sys.executable, "jobs/score.py", "--routes", str(table), "--input", url]
    found = defaultdict(list)
    for _ in range(rounds):
        for name in ("one", "several"):
            output = plant.fresh(root)
            alone = plant.score_command(models[0], url, output)
            run = plant.run(alone if name == "one" else [*routed, "--output", str(output)], server)
            record = plant.run_record(output)
            assert record["counts"]["scored"] == images, record["counts"]
            found[name, "seconds"].append(1e3 * record["seconds"]["score"] / images)
            found[name, "cpu"].append(1e3 * sum(run.cpu_seconds.values()) / images)
            found[name, "loads"].append(record["models_loaded"])
            found[name, "memory"].append(record["peak_memory_bytes"]["worker"] / 1e9)
            shutil.rmtree(output)
            print(
                json.dumps({name: {what: values[-1] for (of, what), values in found.items() if of == name}})
            )

    def row(name: str, count: int) -> str:
        cells = [
            f"{median(found[name, 'seconds']):.1f} ({min(found[name, 'seconds']):.1f} to "
            f"{max(found[name, 'seconds']):.1f})",
            f"{median(found[name, 'cpu']):.1f}",
            f"{median(found[name, 'loads']):.0f}",
            f"{median(found[name, 'memory']):.2f}",
        ]
        return f"| {count} | {images:,} | {' | '.join(cells)} |"

    share = median(found["several", "seconds"]) / median(found["one", "seconds"])
    return f"{row('one', 1)} 1 |\n{row('several', len(models))} {share:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--few", type=int, default=3000, help="images of three models")
    parser.add_argument("--many", type=int, default=5000, help="images of fifty models")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, plant.s3_server() as server:
        root = Path(folder)
        models = [plant.write_model(root / f"model-{i:02}", plant.SETTINGS["light"], i) for i in range(MANY)]
        rows = [
            measure(server, root, prefix, models[:count], images, arguments.rounds)
            for prefix, count, images in (("few", FEW, arguments.few), ("many", MANY, arguments.many))
            if images
        ]
    head = (
        "| models | images | ms per image, median (minimum to maximum) | CPU ms per image, whole job | times "
        "that workers loaded a model | peak memory of a worker, GB | ms per image beside one model |\n"
        "|---|---|---|---|---|---|---|"
    )
    command = f"python benchmarks/models.py --few {arguments.few} --many {arguments.many}"
    results.record(
        "Many models in one night", "\n".join([head, *rows]), f"{command} --rounds {arguments.rounds}"
    )


if __name__ == "__main__":
    main()
