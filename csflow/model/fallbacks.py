"""Remembers what runs more slowly than it could, so that users can read it in the run's record."""

import logging


class Fallbacks:
    """What runs more slowly than it could, and why."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, what: str, reason: object) -> None:
        """Remembers and logs that something is slower.

        Args:
            reason: an exception or words; the first line is kept.
        """
        words = str(reason).strip().partition("\n")[0] or type(reason).__name__
        self.messages.append(f"{what}, more slowly: {words}")
        logging.getLogger(__name__).warning("%s", self.messages[-1])
