"""The jobs as functions: they take the settings of the commands, as keywords or as a YAML file."""

import os
from typing import Any, TypeVar

from csflow.config import JobConfig, configured
from csflow.errors import ExitStatus, Incomplete, WrongUse
from csflow.evaluation import EvaluateConfig
from csflow.evaluation.job import measure
from csflow.exporting.config import ExportConfig
from csflow.library.model import Model, load
from csflow.output.runs import RunRecord
from csflow.scoring.config import ScoreConfig
from csflow.scoring.job import run as run_scoring
from csflow.training.config import TrainConfig
from csflow.training.job import train as run_training

Config = TypeVar("Config", bound=JobConfig)
ConfigFile = str | os.PathLike[str] | None


def train(config: ConfigFile = None, /, **settings: Any) -> Model:
    """Trains a detector as `csflow train` does, on Ray; returns the model that it has written.

    Args:
        config: YAML file of settings.
        settings: those of the command; they override the file's.

    Raises:
        WrongUse: a setting or an input is wrong.
        Incomplete: the training ended before its end; call it again with `resume=True`.
    """
    settings_read = configured(TrainConfig, config, _plain(settings))
    if settings_read.routes is not None:
        raise WrongUse("routes train several models, and this function returns one; run `csflow train`")
    if run_training(settings_read) == ExitStatus.INCOMPLETE:
        raise Incomplete(f"training of {settings_read.output} is incomplete; continue it with resume=True")
    return load(settings_read.output, storage_options=settings_read.storage_options)


def score(config: ConfigFile = None, /, **settings: Any) -> RunRecord:
    """Scores an archive as `csflow score` does, on Ray; returns the record of the run.

    `csflow.read_scores` opens the output. For a few images, `csflow.load(…).score(…)` needs no cluster.

    Args:
        config: YAML file of settings.
        settings: those of the command; they override the file's.

    Raises:
        WrongUse: a setting or an input is wrong.
        Incomplete: rows are missing; the same call continues.
    """
    record = run_scoring(configured(ScoreConfig, config, _plain(settings)))
    if record.exit_status == ExitStatus.INCOMPLETE:
        counts = record.counts
        raise Incomplete(
            f"run {record.run_id} is incomplete: of {counts.listed} images {counts.missing} are missing and "
            f"{counts.permanent_errors} have permanent errors; the same call continues"
        )
    return record


def evaluate(config: ConfigFile = None, /, **settings: Any) -> dict[str, Any]:
    """Measures scores against labels as `csflow evaluate` does; returns what its metrics.json holds.

    Args:
        config: YAML file of settings.
        settings: those of the command; they override the file's.

    Raises:
        WrongUse: a setting or an input is wrong.
    """
    return measure(configured(EvaluateConfig, config, _plain(settings)))


def export(config: ConfigFile = None, /, **settings: Any) -> list[str]:
    """Exports a model as `csflow export` does; returns the address of the artefact in each format.

    Args:
        config: YAML file of settings.
        settings: those of the command; they override the file's.

    Raises:
        WrongUse: a setting is wrong, or the self-test image cannot be read.
        RuntimeError: the artefact does not give the model's score.
    """
    from csflow.exporting.job import export as run_export

    wanted = configured(ExportConfig, config, _plain(settings))
    run_export(wanted)
    return wanted.files()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with paths as text, as on a command line."""

    def text(value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    return {
        name: [text(item) for item in value] if isinstance(value, list | tuple) else text(value)
        for name, value in settings.items()
    }
