"""What a defect list holds: the share of normal images in it, by simulation and on labelled solar cells.

    python benchmarks/fdr.py
    python benchmarks/fdr.py --scores demo/scores --model demo/model --labels demo/cells/labels.csv
    python benchmarks/fdr.py --large 20        # a million images: promised lists and estimated ones, 20 draws

Simulated scores are standard normal, those of defects lie 3 higher, and everything is drawn anew each time.
Of the cells, each draw splits the normal ones that training did not see into held-out and new images, and
takes defective ones at random, without replacement. Intervals are 95 % of the mean over draws; those of the
cells say nothing about other models, as all draws share one.

Of a million images, the scores of 100 defects are spread around the highest of the normal ones: uniformly,
from 0.6 to 1.6 times as far from the median as the score that one normal image exceeds on average.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from csflow.calibration import choose_defects, p_values
from csflow.evaluation.labels import read_labels
from csflow.output.reading import latest_per_image, open_scores
from csflow.report.tail import EstimatedList, estimated_list
from csflow.storage import Location

TAILS = {
    "normal": stats.norm(),
    "gamma, shape 4": stats.gamma(4),
    "exponential": stats.expon(),
    "log-normal, 0.4": stats.lognorm(0.4),
    "Student's t, 8 degrees": stats.t(8),
}
Scores = NDArray[np.float64]
Draw = Callable[[np.random.Generator], tuple[Scores, Scores, Scores]]
"""Scores of held-out normal, new normal and defective images."""


def simulated(heldout: int, normals: int, defects: int) -> Draw:
    def draw(random: np.random.Generator) -> tuple[Scores, Scores, Scores]:
        sizes = (heldout, normals, defects)
        held_out, good, bad = (random.standard_normal(size) for size in sizes)
        return held_out, good, bad + 3

    return draw


def split(normal: Scores, defective: Scores, heldout: int, defects: int) -> Draw:
    def draw(random: np.random.Generator) -> tuple[Scores, Scores, Scores]:
        shuffled = random.permutation(normal)
        return shuffled[:heldout], shuffled[heldout:], random.permutation(defective)[:defects]

    return draw


def chosen_of(held_out: Scores, normal: Scores, defective: Scores, defects: int) -> Draw:
    """Held-out images of one kind, new ones of another."""

    def draw(random: np.random.Generator) -> tuple[Scores, Scores, Scores]:
        return held_out, normal, random.permutation(defective)[:defects]

    return draw


def print_rows(name: str, draw: Draw, rates: list[float], draws: int) -> None:
    for rate in rates:
        random = np.random.default_rng(0)
        false_share, recall, empty = np.empty(draws), np.empty(draws), 0
        for i in range(draws):
            held_out, good, bad = draw(random)
            chosen = choose_defects(p_values(np.concatenate([good, bad]), held_out), rate)
            false_share[i] = chosen[: len(good)].sum() / max(1, chosen.sum())
            recall[i] = chosen[len(good) :].mean()
            empty += not chosen.any()
        half = 1.96 * false_share.std(ddof=1) / np.sqrt(draws)
        sizes = f"{len(held_out):,} | {len(good):,} + {len(bad):,}"
        realised = f"{false_share.mean():.3f} ± {half:.3f} | {np.quantile(false_share, 0.95):.2f}"
        print(f"| {name} | {sizes} | {rate} | {realised} | {recall.mean():.2f} | {empty / draws:.2f} |")


def print_large(draws: int, normals: int = 1_000_000, defects: int = 100, rate: float = 0.1) -> None:
    print(
        "| normal scores | list | said | 95 % interval | realised | largest | interval holds it | found "
        "| listed |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, tail in TAILS.items():
        lists: dict[str, list[tuple[float, ...]]] = defaultdict(list)
        median, highest = tail.isf([0.5, 1 / normals])
        for seed in range(draws):
            random = np.random.default_rng(seed)
            bad = median + (highest - median) * random.uniform(0.6, 1.6, defects)
            every = np.concatenate([tail.rvs(normals, random_state=random), bad])
            for heldout in (1000, 10_000):
                chosen = choose_defects(p_values(every, tail.rvs(heldout, random_state=random)), rate)
                lists[f"promised, {heldout:,} held out"].append((rate, 0, 1, *_figures(chosen, normals)))
            estimate = estimated_list(every, rate)
            assert isinstance(estimate, EstimatedList), estimate
            said = estimate.normal_share, *estimate.interval
            lists["estimated"].append((*said, *_figures(estimate.is_chosen_M, normals)))
        for kind, rows in lists.items():
            said, low, high, real, found, listed = np.array(rows).T
            holds = f"{((low <= real) & (real <= high)).mean():.2f}" if kind == "estimated" else ""
            interval = f"{low.mean():.2f} to {high.mean():.2f}" if kind == "estimated" else ""
            print(
                f"| {name} | {kind} | {said.mean():.2f} | {interval} | {real.mean():.3f} | {real.max():.2f} "
                f"| {holds} | {found.mean():.2f} | {listed.mean():.0f} |",
                flush=True,
            )


def _figures(is_chosen: NDArray[np.bool_], normals: int) -> tuple[float, float, float]:
    """The share of normal images on a list, the share of defects that it finds, and its length."""
    listed = float(is_chosen.sum())
    return is_chosen[:normals].sum() / max(1, listed), is_chosen[normals:].mean(), listed


def read_cells(scores: str, model: str, labels: str) -> tuple[dict[str, float], dict[str, float]]:
    """Scores by image URI of normal cells that training did not see, and of defective ones."""
    table = open_scores(Location(scores)).scores.to_table(columns=["image_uri", "anomaly_score", "scored_at"])
    table = latest_per_image(table, "scored_at")
    score_of = dict(zip(table["image_uri"].to_pylist(), table["anomaly_score"].to_pylist(), strict=True))
    label_of = read_labels(Location(labels))
    held_out = pq.read_table(f"{model}/calibration.parquet")["image_uri"].to_pylist()
    unseen = [*held_out, *(uri for uri, label in label_of.items() if not label.is_defective)]
    defective = [uri for uri, label in label_of.items() if label.is_defective]
    return {uri: score_of[uri] for uri in unseen}, {uri: score_of[uri] for uri in defective}


def values(score_of: dict[str, float], kind: str = "") -> Scores:
    return np.array([score for uri, score in sorted(score_of.items()) if kind in uri.rpartition("/")[2]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", help="output of the demo's scoring run")
    parser.add_argument("--model", help="the demo's model directory")
    parser.add_argument("--labels", help="the demo's labels.csv")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--large", type=int, metavar="DRAWS", help="only lists of a million images")
    arguments = parser.parse_args()
    if arguments.large:
        print_large(arguments.large)
        return
    print("| images | held out | normal + defective | wanted | realised | 95 % below | found | empty |")
    print("|---|---|---|---|---|---|---|---|")
    for heldout, normals, defects in [(999, 900, 100), (999, 500, 500), (9999, 9900, 100), (199, 900, 100)]:
        print_rows("simulated", simulated(heldout, normals, defects), arguments.rates, arguments.draws)
    if arguments.scores is None:
        return
    good, bad = read_cells(arguments.scores, arguments.model, arguments.labels)
    half = len(good) // 2
    for defects in (half // 9, half):
        draw = split(values(good), values(bad), half, defects)
        print_rows("solar cells", draw, arguments.rates, arguments.draws)
    for kind, other in [("mono", "poly"), ("poly", "mono")]:
        draw = chosen_of(values(good, kind), values(good, other), values(bad, other), 150)
        print_rows(f"{other}, held out {kind}", draw, arguments.rates, arguments.draws)


if __name__ == "__main__":
    main()
