"""How large a change of the scores a run sees, by the number of held-out images, by simulation.

    python benchmarks/drift_power.py

Scores of held-out and of new images are normally distributed, those of the 300 new ones with a higher mean.
The table has the share of runs whose verdict is a drift. A shift is in standard deviations of the scores; a
verdict at 0 is a false alarm. A real run tests the global scores, too.
"""

import argparse

import numpy as np

from csflow.calibration import drift

HELD_OUT = (12, 40, 60, 100, 200, 400)
SHIFTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
NEW = 300


def seen(heldout: int, shift: float, draws: int) -> float:
    """The share of draws in which the shift is called a drift."""
    random = np.random.default_rng(0)

    def has_drifted() -> bool:
        found = drift(random.standard_normal(NEW) + shift, 0.0, random.standard_normal(heldout))
        return found is not None and found.has_drifted

    return float(np.mean([has_drifted() for _ in range(draws)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=400)
    arguments = parser.parse_args()
    print("| held out |" + "".join(f" {shift:g} |" for shift in SHIFTS))
    print("|---" * (1 + len(SHIFTS)) + "|")
    for heldout in HELD_OUT:
        shares = [seen(heldout, shift, arguments.draws) for shift in SHIFTS]
        print(f"| {heldout} |" + "".join(f" {share:.0%} |" for share in shares))


if __name__ == "__main__":
    main()
