"""The `csflow` command, and what the scripts in `jobs/` call: every verb with its settings and its function.

A verb's modules take seconds to import, so `run` first prints that the verb starts, then imports them.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from csflow import __version__
from csflow.console import complain, greet
from csflow.errors import ExitStatus, WrongUse
from csflow.flags import VERSION_HELP, FlagParser
from csflow.threads import let_waiting_threads_sleep


@dataclass(frozen=True)
class Command:
    """A verb, with its settings and its function as `module:name`."""

    summary: str
    config: str
    main: str
    examples: tuple[str, ...]
    after_stop: str = ""
    """What to say after Ctrl-C about continuing the work."""
    is_job: bool = True
    """Whether the verb runs for some time, so that it first prints that it has started."""

    def doc(self) -> str:
        """The text above the settings in `--help`."""
        return "\n".join([f"{self.summary}.", "", *(f"  csflow {example}" for example in self.examples)])


COMMANDS = {
    "train": Command(
        "Train a detector on images of good parts",
        "csflow.training.config:TrainConfig",
        "csflow.training.job:train",
        ("train --input s3://plant/good --output s3://plant/models/cells",),
        after_stop="; the same command with --resume continues",
    ),
    "score": Command(
        "Score images with a trained model; repeat the command to complete the output",
        "csflow.scoring.config:ScoreConfig",
        "csflow.scoring.job:score",
        ("score --model s3://plant/models/cells --input s3://plant/images --output s3://plant/scores",),
        after_stop="; the same command continues",
    ),
    "evaluate": Command(
        "Measure how well scores separate normal from defective images",
        "csflow.evaluation:EvaluateConfig",
        "csflow.evaluation:evaluate",
        ("evaluate --scores out --labels labels.csv", "evaluate --scores out --layout mvtec"),
    ),
    "report": Command(
        "Write one HTML page about the scores of an archive",
        "csflow.report:ReportConfig",
        "csflow.report:report",
        ("report --scores s3://plant/scores --output report.html",),
    ),
    "masks": Command(
        "Write the regions of scored images as masks for labelling tools",
        "csflow.masks:MasksConfig",
        "csflow.masks:write_masks",
        (
            "masks --scores s3://plant/scores --output s3://plant/masks",
            "masks --scores out --output masks --format png --run_id latest",
        ),
    ),
    "compact": Command(
        "Merge the many small files of scores into few large ones, in another folder",
        "csflow.compaction:CompactConfig",
        "csflow.compaction:compact",
        ("compact --scores s3://plant/scores --output s3://plant/scores-compacted",),
        after_stop="; the same command continues",
    ),
    "prune": Command(
        "Delete what an output no longer needs: records of old runs, leftovers of plans, a model's scores",
        "csflow.pruning:PruneConfig",
        "csflow.pruning:prune",
        (
            "prune --scores s3://plant/scores --runs_before 2026-01-01",
            "prune --scores s3://plant/scores --drop_model 8c1f09e2a7b3d456 --dry_run",
        ),
    ),
    "recalibrate": Command(
        "Give a model new p-values and thresholds from recent images of good parts",
        "csflow.recalibration:RecalibrateConfig",
        "csflow.recalibration:recalibrate",
        (
            "recalibrate --model s3://plant/models/cells --input s3://plant/june --output s3://plant/models/june",
        ),
    ),
    "import": Command(
        "Convert a model of other software to a csflow model directory",
        "csflow.importing.job:ImportConfig",
        "csflow.importing.job:import_model",
        ("import --checkpoint flow.pth --output s3://plant/models/cells --calibrate s3://plant/good",),
    ),
    "export": Command(
        "Export a model as one artefact for ONNX Runtime or OpenVINO, to score beside the camera",
        "csflow.exporting.config:ExportConfig",
        "csflow.exporting.job:export",
        ("export s3://plant/models/cells --to onnx --output cells.onnx --runtime csflow-edge.pyz",),
    ),
    "promote": Command(
        "Name the model in use in a pointer, which --model of scoring takes, or go back to the one before",
        "csflow.promotion:PromoteConfig",
        "csflow.promotion:promote",
        (
            "promote s3://plant/models/cells-2026-11-27 s3://plant/models/current.json",
            "promote --back s3://plant/models/current.json",
        ),
        is_job=False,
    ),
    "inspect": Command(
        "Show a model directory or an output of scoring at a glance",
        "csflow.inspection:InspectConfig",
        "csflow.inspection:inspect",
        ("inspect s3://plant/models/cells", "inspect s3://plant/scores"),
        is_job=False,
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
        verb = words[0]
        run(verb, COMMANDS[verb].doc(), words[1:], f"csflow {verb}")
    try:
        options = _parser().parse(words)
        if "print_completion" not in options:
            raise WrongUse("a command is needed; see csflow --help")
    except WrongUse as error:
        complain(str(error))
        sys.exit(int(ExitStatus.WRONG_USE))
    print(completion(options["print_completion"]))


def run(verb: str, doc: str | None, argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Runs a verb on its command line, and leaves the process with its exit status.

    Args:
        doc: the text above the settings in `--help`.
        argv: the command line; by default that of the process.
        prog: the command's name in messages; by default the name of the script.
    """
    command = COMMANDS[verb]
    words = list(sys.argv[1:] if argv is None else argv)
    interrupts = _Interrupts()
    let_waiting_threads_sleep()
    # After a stall a thread still waits for results. When the process ends it would start Ray a second time.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

    def work(config: Any) -> ExitStatus:
        # Imported when the settings are known to be right: --help comes at once.
        main = load(command.main)
        interrupts.raise_again()
        status: ExitStatus = main(config)
        return status

    try:
        if command.is_job:
            greet(verb, words)
        from csflow.exit import run_job

        run_job(load(command.config), work, doc, words, prog)
    except KeyboardInterrupt:
        # A second Ctrl-C ends the process at once, even if Ray does not let go.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        after_echo = "\n" if sys.stderr.isatty() else ""  # the terminal has just written ^C
        print(f"{after_echo}stopped{command.after_stop}", file=sys.stderr)
        from csflow.exit import leave

        leave(ExitStatus.STOPPED)


class _Interrupts:
    """Remembers Ctrl-C, since modules that are being imported may swallow the exception."""

    def __init__(self) -> None:
        self._came = False
        # Else it is to be ignored, as in the background of a script.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    def raise_again(self) -> None:
        if self._came:
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        self._came = True
        raise KeyboardInterrupt


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


def _parser() -> FlagParser:
    width = max(map(len, COMMANDS)) + 2
    verbs = "\n".join(f"  {verb:<{width}}{command.summary}" for verb, command in COMMANDS.items())
    parser = FlagParser(
        prog="csflow",
        usage="csflow COMMAND [settings]",
        description="Finds defects in photographs by learning only from good ones.\n\ncommands:\n" + verbs,
        epilog="csflow COMMAND --help explains a command's settings.",
    )
    parser.add_argument("command", nargs="?", default=None, choices=list(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"csflow {__version__}", help=VERSION_HELP)
    parser.add_argument(
        "--print_completion",
        metavar="SHELL",
        choices=["bash", "zsh", "fish"],
        help="Print a script that completes commands and settings in bash, zsh or fish.",
    )
    return parser


if __name__ == "__main__":
    main()
