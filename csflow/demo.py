"""The demo's data and question: solar cells from the package `elpv-dataset`, and SQL over their scores.

2,624 electroluminescence photographs of solar cells with a defect probability each, by Deitsch et al.,
Solar Energy 185 (2019), https://github.com/zae-bayern/elpv-dataset (images: CC BY-NC-SA 4.0).

    python -m csflow.demo cells demo/cells     # write the photographs and labels.csv
    python -m csflow.demo query demo/scores    # ask DuckDB for the worst cells
"""

import argparse
import csv
import importlib.util
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

TRAINING_CELLS = 1000

QUERY = """\
SELECT split_part(image_uri, '/cells/', 2)        AS cell,
       round(anomaly_score, 3)                    AS score,
       round(p_value, 4)                          AS p_value,
       image_height || ' x ' || image_width       AS pixels,
       round(peak_y)::INT || ', ' || round(peak_x)::INT AS peak_y_x
FROM read_parquet('{scores}/scores/*/*/*.parquet', hive_partitioning = true)
ORDER BY anomaly_score DESC
LIMIT 8"""


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


def query(scores: str) -> None:
    """Prints an SQL question over the Parquet files and DuckDB's answer."""
    import duckdb

    sql = QUERY.format(scores=scores.rstrip("/"))
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
    parser.add_argument("step", choices=["cells", "query"])
    parser.add_argument("folder")
    arguments = parser.parse_args()
    if arguments.step == "cells":
        write_cells(Path(arguments.folder))
    else:
        query(arguments.folder)
