"""The parser of flags, which may have hyphens or underscores; a wrong flag becomes an error of one line."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csflow.errors import WrongUse

VERSION_HELP = "Print the version and exit."


def spelling(name: str) -> str:
    """The name of a flag or setting, in which a hyphen counts as an underscore."""
    return name.replace("-", "_")


class FlagParser(argparse.ArgumentParser):
    """An argument parser that takes `--image-size` for `--image_size`, and raises WrongUse.

    A flag cannot be abbreviated, because an abbreviation can become ambiguous when a setting is added.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            **options,
        )

    def parse(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """The values in these words, by default in the command line of the process. Raises WrongUse."""
        known = {spelling(flag): flag for action in self._actions for flag in action.option_strings}
        return vars(self.parse_args(_respelled(sys.argv[1:] if words is None else words, known)))

    def error(self, message: str) -> Any:
        raise WrongUse(f"{message}; see {Path(self.prog).name} --help")


def _respelled(words: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """The words, with known flags in the spelling of the parser."""
    flags = [word.partition("=") for word in words]
    return [known.get(spelling(flag), flag) + equals + value for flag, equals, value in flags]
