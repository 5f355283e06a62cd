"""The tables of the quality benchmark, in Markdown: one of figures and one of p-values for each data set."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quality_data import DATA_SETS

Line = dict[str, Any]
Rows = dict[str, list[Line]]
"""Lines of all seeds by the name of their row."""

FILES = ("flows.jsonl", "baselines.jsonl", "anomalib.jsonl")
COLUMNS = {
    "auroc": "AUROC",
    "global_auroc": "of the global score",
    "local_auroc": "of the local score",
    "detected": "detected at p ≤ 0.01",
    "found_at_1_percent": "found at 1 % FPR",
    "aupro": "AUPRO",
    "validation_loss": "validation loss",
    "gaussian_loss": "the Gaussian's",
    "epochs": "epochs",
    "train_cpu_seconds": "training, CPU s",
}
SCORES = ("", "global_", "local_")
"""Prefixes of the figures of a score."""


def tables(work: Path) -> str:
    """Of what has finished in this folder."""
    lines = [line for name in FILES for line in _read(work / name)]
    parts = []
    for data in DATA_SETS:
        rows = _rows([line for line in lines if line["data"] == data])
        if rows:
            parts += [f"## {data}", "\n".join(_figures(rows)), "\n".join(_p_values(rows))]
    return "\n\n".join(part for part in parts if part)


def _read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _rows(lines: Sequence[Line]) -> Rows:
    """Of each simple detector only the variant of the score that has the best mean AUROC."""
    variants: dict[str, Rows] = {}
    for line in lines:
        name = f"{line['detector']}, {line['features']}" if "features" in line else line["detector"]
        variants.setdefault(name, {}).setdefault(line.get("variant", ""), []).append(line)
    rows = {}
    for name, by_variant in variants.items():
        best = max(by_variant, key=lambda variant: _mean(by_variant[variant], "auroc"))
        rows[f"{name}; {best}" if best else name] = by_variant[best]
    return rows


def _figures(rows: Rows) -> Iterator[str]:
    shown = {name: head for name, head in COLUMNS.items() if any(_known(r, name) for r in rows.values())}
    yield f"| detector | seeds | {' | '.join(shown.values())} |"
    yield "|---" * (2 + len(shown)) + "|"
    for name, lines in rows.items():
        yield f"| {name} | {len(lines)} | {' | '.join(_spread(_known(lines, column)) for column in shown)} |"


def _p_values(rows: Rows) -> Iterator[str]:
    """How many normal images were flagged at 5 %, of how many, and how uniform p-values are."""
    checked = {name: lines for name, lines in rows.items() if _known(lines, "flagged")}
    if not checked:
        return
    heads = [f"{score or 'anomaly_'}score".replace("_", " ") for score in SCORES]
    normals = next(iter(checked.values()))[0]["normals"]
    yield f"| flagged of {normals} normal images at p ≤ 0.05; uniformity | expected | {' | '.join(heads)} |"
    yield "|---" * (2 + len(SCORES)) + "|"
    for name, lines in checked.items():
        cells = [_flagged(lines, score) for score in SCORES]
        yield f"| {name} | {lines[0]['flagged_low']} to {lines[0]['flagged_high']} | {' | '.join(cells)} |"


def _flagged(lines: Sequence[Line], score: str) -> str:
    """For each seed: number flagged; p-value of the test for uniformity."""
    pairs = [
        (line[f"{score}flagged"], line[f"{score}uniform"]) for line in lines if f"{score}flagged" in line
    ]
    return ", ".join(f"{flagged} ({uniform:.2f})" for flagged, uniform in pairs)


def _known(lines: Sequence[Line], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def _mean(lines: Sequence[Line], name: str) -> float:
    values = _known(lines, name)
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> str:
    """Mean, and range over seeds."""
    if not values:
        return ""
    digits = 0 if max(values) >= 10 or all(value == int(value) for value in values) else 3
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{ends}"
