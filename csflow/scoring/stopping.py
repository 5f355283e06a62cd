"""Decides when a scoring run stops early, because it is useless to continue."""

from dataclasses import dataclass

from csflow.errors import Failed
from csflow.scoring.tally import Tally

FAILED_SHARDS_TO_STOP = 4
"""A run stops if its first shards, this many or all of them, fail as a whole."""
FAILED_SHARDS_IN_A_ROW = 16
"""A run also stops if this many shards in a row fail as a whole, for instance because the disk is full."""


@dataclass
class StopRules:
    """Decides after each shard. The caller notices if no shard comes back at all."""

    shards: int
    """Number of shards in the whole run."""
    max_error_rate: float
    failed_in_a_row: int = 0

    def reason(self, tally: Tally, failure: str | None) -> str | None:
        """The reason to stop after this shard, or None. `failure` is the shard's error if the shard failed.

        Raises:
            Failed: the first shards all failed as a whole, so the rest would fail too.
        """
        done, failed = (number - tally.without_model for number in (len(tally.shards), tally.failed_shards))
        self.failed_in_a_row = self.failed_in_a_row + 1 if failure else 0
        if failed == done == min(self.shards, FAILED_SHARDS_TO_STOP):
            raise Failed(f"the first {done} shards failed, nothing of them was written; the last: {failure}")
        if self.failed_in_a_row == FAILED_SHARDS_IN_A_ROW:
            return f"the last {FAILED_SHARDS_IN_A_ROW} shards failed, see above"
        if tally.fails_everywhere(self.max_error_rate):
            return f"{tally.errors} of {tally.images} images failed: {dict(tally.error_codes)}"
        return None
