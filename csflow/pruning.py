"""The prune job: deletes what an output no longer needs, and nothing that a run rests on."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from typing import Literal

from csflow.config import JobConfig
from csflow.errors import ExitStatus, WrongUse
from csflow.output.layout import Output, run_folder, run_ids, run_started_at, scored_models
from csflow.scoring.plan_log import PlanLog
from csflow.storage import Location

KINDS: tuple[Literal["errors", "scores", "_plans"], ...] = ("errors", "scores", "_plans")
"""What there is of a model. Plans go last: while they are there, what is left of its scores still counts."""


class PruneConfig(JobConfig):
    """Settings of `csflow prune`."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs. Leftovers of plans are always deleted: images
    of a plan that lost to another run, and outdated summaries of finished shards."""
    runs_before: date | None = None
    """Delete the records and frozen listings of runs that began before this day, such as 2026-01-01; the last
    run's are kept. [default: keep all]"""
    drop_model: str | None = None
    """Delete all scores, errors and plans of this model. Its images count as not scored. [default: none]"""
    dry_run: bool = False
    """Only say what would be deleted."""


def prune(config: PruneConfig) -> ExitStatus:
    """Deletes, and says how much of what it deleted.

    Raises:
        WrongUse: there are no scores, or none of the model that is to be dropped.
    """
    location = Location(config.scores, config.storage_options)
    models = scored_models(location)
    if not models:
        raise WrongUse(f"{location} holds no scores; scores are in the --output of `csflow score`")
    if config.drop_model is not None and config.drop_model not in models:
        raise WrongUse(f"{location} has no scores of {config.drop_model}; it has {', '.join(models)}")

    def delete(places: Iterable[Location], what: str, remove: Callable[[Location], None]) -> None:
        number = 0
        for place in places:
            number += 1
            if not config.dry_run:
                remove(place)
        if number:
            print(f"{number:,} {what} {'would be' if config.dry_run else 'were'} deleted")

    if config.runs_before:
        delete(_runs_before(location, config.runs_before), "runs", Location.remove_folder)
    for model_id in sorted({*models} - {config.drop_model}):
        output = Output(location, model_id)
        delete(_leftovers(output), f"leftovers of plans of model {model_id}", Location.remove)
    if config.drop_model:
        output = Output(location, config.drop_model)
        for kind in KINDS:
            files = len(output.folder(kind).find(""))
            what = f"folder of {kind.removeprefix('_')} of model {config.drop_model} with {files:,} files"
            delete([output.folder(kind)] if files else [], what, Location.remove_folder)
    return ExitStatus.DONE


def _runs_before(location: Location, day: date) -> Iterator[Location]:
    """Folders of runs that began before this day, by UTC, but for the last run's."""
    for run_id in run_ids(location)[:-1]:
        began = run_started_at(run_id)
        if began and began.date() < day:
            yield run_folder(location, run_id)


def _leftovers(output: Output) -> Iterator[Location]:
    """Files of plans that were not appended, since another run was first, and outdated outcome files.

    Which of several outcome files of the same shards is up to date, only a run finds out; it writes one anew.
    """
    plan_folders = {plan.number: plan.folder for plan in PlanLog(output).read()}
    outcome_files = defaultdict(list)
    for file in output.folder("_plans").find(".parquet"):
        folder = file.parent.name
        number = int(folder.partition("-")[0])
        # A plan without an entry may be of a run that is just about to append it.
        if plan_folders.get(number, folder) != folder:
            yield file
        elif file.name.startswith("outcome-"):
            outcome_files[folder, file.name.rpartition("-")[0]].append(file)
    for same in outcome_files.values():
        if len(same) > 1:
            yield from same
