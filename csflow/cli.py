"""The `csflow` command: every verb with the settings and the function that `jobs/` has for it.

Nothing is imported before the verb is known, so that help and wrong use come at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from csflow.errors import ExitStatus


@dataclass(frozen=True)
class Command:
    """A verb: where its settings and its function are, as `module:name`."""

    summary: str
    config: str
    main: str
    examples: tuple[str, ...]

    def doc(self) -> str:
        """The text above the settings in `--help`."""
        return "\n".join([f"{self.summary}.", "", *(f"  csflow {example}" for example in self.examples)])


COMMANDS = {
    "train": Command(
        "Train a detector on images of good parts",
        "csflow.training.config:TrainConfig",
        "csflow.training.job:train",
        ("train --input s3://plant/good --output s3://plant/models/cells",),
    ),
    "score": Command(
        "Score images with a trained model; the same line again completes the output",
        "csflow.scoring.config:ScoreConfig",
        "csflow.scoring.job:score",
        ("score --model s3://plant/models/cells --input s3://plant/images --output s3://plant/scores",),
    ),
    "evaluate": Command(
        "Measure how well scores separate normal from defective images",
        "csflow.evaluate:EvaluateConfig",
        "csflow.evaluate:evaluate",
        ("evaluate --scores out --labels labels.csv", "evaluate --scores out --layout mvtec"),
    ),
    "report": Command(
        "Write one HTML page about the scores of an archive",
        "csflow.report:ReportConfig",
        "csflow.report:report",
        ("report --scores s3://plant/scores --output report.html",),
    ),
    "import": Command(
        "Turn a model that other software trained into a model directory",
        "csflow.import_model:ImportConfig",
        "csflow.import_model:import_model",
        ("import --checkpoint flow.pth --output s3://plant/models/cells --calibrate s3://plant/good",),
    ),
    "inspect": Command(
        "Show a model directory or an output of scoring at a glance",
        "csflow.inspection:InspectConfig",
        "csflow.inspection:inspect",
        ("inspect s3://plant/models/cells", "inspect s3://plant/scores"),
    ),
    "register": Command(
        "Register an output of scoring as tables of Apache Iceberg or Delta Lake",
        "csflow.tables.job:RegisterConfig",
        "csflow.tables.job:register",
        (
            "register --scores s3://plant/scores --format delta",
            "register --scores s3://plant/scores --format iceberg --catalog sqlite:///catalog.db",
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and leaves the process with its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        from csflow.config import run_job

        verb = words[0]
        command = COMMANDS[verb]
        run_job(load(command.config), load(command.main), command.doc(), words[1:], f"csflow {verb}")
    options = _parser().parse_args(words)
    if options.print_completion:
        print(completion(options.print_completion))
        return
    print("error: a command is needed; see csflow --help", file=sys.stderr)
    sys.exit(int(ExitStatus.WRONG_USE))


def load(place: str) -> Any:
    """The object at `module:name`."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def completion(shell: str) -> str:
    """A script that completes commands and their settings in a shell."""
    import shtab

    from csflow.config import build_parser

    parser = argparse.ArgumentParser(prog="csflow")
    verbs = parser.add_subparsers()
    for verb, command in COMMANDS.items():
        own = build_parser(load(command.config), command.doc(), f"csflow {verb}")
        verbs.add_parser(verb, help=command.summary, parents=[own], add_help=False)
    return str(shtab.complete(parser, shell))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        print(f"error: {message}; see csflow --help", file=sys.stderr)
        sys.exit(int(ExitStatus.WRONG_USE))


def _parser() -> argparse.ArgumentParser:
    from csflow import __version__

    verbs = "\n".join(f"  {verb:<10}{command.summary}" for verb, command in COMMANDS.items())
    parser = _Parser(
        prog="csflow",
        usage="csflow COMMAND [settings]",
        description="Finds defects in photographs by learning only from good ones.\n\ncommands:\n" + verbs,
        epilog="csflow COMMAND --help explains a command's settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"csflow {__version__}")
    parser.add_argument(
        "--print_completion",
        metavar="SHELL",
        choices=["bash", "zsh", "fish"],
        help="Print a script that completes commands and settings in bash, zsh or fish.",
    )
    return parser


if __name__ == "__main__":
    main()
