"""The demo's data and question: solar cells from the package `elpv-dataset`, and SQL over their scores.

2,624 electroluminescence photographs of solar cells with a defect probability each, by Deitsch et al.,
Solar Energy 185 (2019), https://github.com/zae-bayern/elpv-dataset (images: CC BY-NC-SA 4.0).

    python -m csflow.demo cells demo/cells     # write the photographs and labels.csv
    python -m csflow.demo query demo/scores    # ask DuckDB for the worst cells

A made-up plant of the same cells has two products, two lines and two cameras (docs/howto/plant.md):

    python -m csflow.demo plant demo/plant     # write its photographs and its table of routes
    python -m csflow.demo lines demo/plant/scores  # ask DuckDB for each line and camera
"""

import argparse
import csv
import importlib.util
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageFilter

TRAINING_CELLS = 1000
GOOD_PARTS, NIGHT_PARTS, DEFECTIVE_PARTS = 150, 60, 15
"""Parts of each product of the made-up plant: good ones to train on, all of its night, and the defective of
these. Both cameras see each part."""

QUERY = """\
SELECT split_part(image_uri, '/cells/', 2)        AS cell,
       round(anomaly_score, 3)                    AS score,
       round(p_value, 4)                          AS p_value,
       image_height || ' x ' || image_width       AS pixels,
       round(peak_y)::INT || ', ' || round(peak_x)::INT AS peak_y_x
FROM read_parquet('{scores}/scores/*/*/*.parquet', hive_partitioning = true)
ORDER BY anomaly_score DESC
LIMIT 8"""

LINES = """\
SELECT tags['product'] AS product, tags['line'] AS line, tags['camera'] AS camera, count(*) AS images,
       count_if(is_anomalous) AS anomalous, round(avg(p_value), 3) AS mean_p_value
FROM read_parquet('{scores}/scores/*/*/*.parquet')
GROUP BY ALL
ORDER BY ALL"""

ROUTES = """\
routes:
  - name: mono
    images: "{folder}/*/{{line}}/{{product}}/{{part}}_{{camera}}.png"
    where: {{product: mono}}
    model: {folder}/models/mono
  - name: poly
    images: "{folder}/*/{{line}}/{{product}}/{{part}}_{{camera}}.png"
    where: {{product: poly}}
    model: {folder}/models/poly
"""


def write_cells(folder: Path) -> None:
    """Writes the photographs into folders, with labels for those that training does not use.

    `functional/train` and `functional/test` have defect probability 0, `defective` has 1, and `uncertain` has
    the rest, on which experts were not sure. `labels.csv` names the test and the defective cells.
    """
    cells = sorted(photographs())
    random.Random(0).shuffle(cells)
    labels, trained_on = [], 0
    for source, probability, kind in cells:
        if 0 < probability < 1:
            subfolder, label = "uncertain", None
        elif probability == 1:
            subfolder, label = "defective", 1
        elif trained_on < TRAINING_CELLS:
            trained_on += 1
            subfolder, label = "functional/train", None
        else:
            subfolder, label = "functional/test", 0
        name = f"{subfolder}/{source.stem}-{kind}{source.suffix}"
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
        # copy2 keeps the time of change, and so the image version: a second demo scores nothing anew.
        shutil.copy2(source, folder / name)
        if label is not None:
            labels.append((name, label))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_uri", "label"])
        writer.writerows(sorted(labels))
    print(f"{len(cells)} cells in {folder}: {trained_on} to train on, {len(labels)} in labels.csv")


def write_plant(folder: Path) -> None:
    """Writes photographs of good parts and of a night, and `plant.yaml`, the table of their routes.

    Mono- and polycrystalline cells are two products. The camera `top` sees a whole cell, `side` a darker and
    blurred half of it. Defective cells are on line 2 only.
    """
    cells = sorted(photographs())
    random.Random(0).shuffle(cells)
    images = 0
    for product in ("mono", "poly"):
        good = [source for source, probability, kind in cells if kind == product and probability == 0]
        bad = [source for source, probability, kind in cells if kind == product and probability == 1]
        night = good[GOOD_PARTS : GOOD_PARTS + NIGHT_PARTS - DEFECTIVE_PARTS]
        for number, source in enumerate(good[:GOOD_PARTS]):
            images += _photograph(source, folder / "good" / f"line-{1 + number % 2}" / product)
        for number, source in enumerate([*night, *bad[:DEFECTIVE_PARTS]]):
            line = 2 if number >= len(night) else 1 + number % 2
            images += _photograph(source, folder / "night" / f"line-{line}" / product)
    (folder / "plant.yaml").write_text(ROUTES.format(folder=folder))
    print(f"{images} photographs and plant.yaml in {folder}")


def _photograph(cell: Path, folder: Path) -> int:
    """What both cameras make of a cell; returns how many photographs that are."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(cell) as seen:
        whole = seen.convert("L")
    half = whole.crop((0, 0, whole.width, whole.height // 2)).filter(ImageFilter.GaussianBlur(1))
    views = {"top": whole, "side": half.point(lambda value: value * 0.7)}
    part = cell.stem.removeprefix("cell")
    for camera, view in views.items():
        view.save(folder / f"{part}_{camera}.png")
    return len(views)


def query(scores: str, question: str) -> None:
    """Prints an SQL question over the Parquet files and DuckDB's answer."""
    import duckdb

    sql = question.format(scores=scores.rstrip("/"))
    print(f"{sql};\n")
    print(duckdb.sql(sql))


def photographs() -> Iterator[tuple[Path, float, str]]:
    """Path, defect probability and kind (mono or poly) of every photograph."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: the demo's photographs are missing; pip install elpv-dataset")
    data = Path(spec.submodule_search_locations[0]) / "data"
    for line in (data / "labels.csv").read_text().splitlines():
        name, probability, kind = line.split()
        yield data / name, float(probability), kind


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["cells", "query", "plant", "lines"])
    parser.add_argument("folder")
    arguments = parser.parse_args()
    if arguments.step == "cells":
        write_cells(Path(arguments.folder))
    elif arguments.step == "plant":
        write_plant(Path(arguments.folder))
    else:
        query(arguments.folder, {"query": QUERY, "lines": LINES}[arguments.step])
