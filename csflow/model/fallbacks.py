"""Remembers what runs more slowly than it could, so that users can read it in the run's record."""

import logging


class Fallbacks:
    """What runs more slowly than it could, and why."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, what: str, reason: object, is_logged: bool = True) -> None:
        """Remembers that something is slower.

        Args:
            reason: an exception or words; the first line is kept.
            is_logged: whether to log it, too, since it is a surprise.
        """
        words = str(reason).strip().partition("\n")[0] or type(reason).__name__
        self.messages.append(f"{what}, more slowly: {words}")
        if is_logged:
            logging.getLogger(__name__).warning("%s", self.messages[-1])
