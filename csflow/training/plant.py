"""Trains a model for each rule of a table of routes, one after the other, over one listing and one cache."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa

from csflow.console import say, warn
from csflow.errors import ExitStatus, Failed, WrongUse
from csflow.model_directory import check_free, holds_model, read_config
from csflow.preflight import some_sizes
from csflow.routes import Routes, Rule, read_routes
from csflow.storage import Location
from csflow.training.config import TrainConfig, check_mask
from csflow.training.mask import Mask, UnsizedMask, mask_for, read_mask
from csflow.training.parts import check_tags, with_tags
from csflow.training.resumption import repeats
from csflow.training.shards import listing_fingerprint
from csflow.training.split import check_enough, count_units


@dataclass(frozen=True)
class _Training:
    """The training of one model, which one rule or several name."""

    rules: list[str]
    config: TrainConfig
    """As for a training of this model alone."""
    mask: Mask | UnsizedMask | None

    @classmethod
    def of(cls, rules: list[Rule], config: TrainConfig) -> "_Training":
        """The training of these rules' model. Raises WrongUse, naming the rules, if their mask is wrong."""
        names = [rule.name for rule in rules]
        own = _alone(config, rules[0])
        with _naming(names):
            check_mask(own)
            return cls(names, own, read_mask(own))

    @property
    def output(self) -> Location:
        return Location(self.config.output, self.config.storage_options)

    def is_done(self, images: pa.Table) -> bool:
        """Whether its output holds what this training gives."""
        config = self.config.with_calibration(count_units(images))
        return holds_model(self.output) and repeats(
            read_config(self.output),
            config,
            listing_fingerprint(images),
            self.mask.text if isinstance(self.mask, Mask) else self.config.mask,
        )

    def with_mask_for(self, images: pa.Table) -> "_Training":
        """The same with its mask for these images. Raises WrongUse if it has another shape than they."""
        sizes = some_sizes(images, self.config.storage_options) if self.mask else []
        if self.mask is None or not sizes:  # without sizes, the training itself says what is wrong
            return self
        with _naming(self.rules):
            return replace(self, mask=mask_for(self.mask, sizes))


def train_by_routes(
    config: TrainConfig,
    list_images: Callable[[TrainConfig], pa.Table],
    train: Callable[[TrainConfig, pa.Table], ExitStatus],
) -> ExitStatus:
    """Trains the models of all rules, or of those that `--only` names. One that fails stops no other.

    Args:
        train: trains one model on listed images.

    Raises:
        WrongUse: table or settings are wrong, or a rule has too few images; nothing has been trained then.
        Failed: some were not trained.
    """
    assert config.routes is not None
    routes = read_routes(config.routes, config.storage_options)
    trainings = _trainings(config, routes)
    for one in trainings:
        check_free(one.output, config.overwrite or config.resume)
    check_tags(config.part, config.calibrate_by, sorted(routes.tags()), "the rules of --routes")
    images = _apart(list_images(config), routes)
    images = {
        rule: with_tags(own, routes.tags_of, config.part, config.calibrate_by) for rule, own in images.items()
    }
    for one in trainings:
        _check_enough(one, images[one.rules[0]].num_rows)
    trainings = [one.with_mask_for(images[one.rules[0]]) for one in trainings]
    statuses, failed = [], []
    for one in trainings:
        own, names = images[one.rules[0]], ", ".join(one.rules)
        if config.resume and one.is_done(own):
            say(f"rule {names}: {one.output} is trained")
            continue
        say(f"rule {names}: {own.num_rows} images, for {one.output}")
        try:
            statuses.append(train(one.config, own))
        except (WrongUse, Failed) as error:
            warn(f"rule {names} was not trained: {error}")
            failed.append(names)
    if failed:
        raise Failed(
            f"{len(failed)} of {len(trainings)} models were not trained ({'; '.join(failed)}), see above"
        )
    return ExitStatus.INCOMPLETE if ExitStatus.INCOMPLETE in statuses else ExitStatus.DONE


def _trainings(config: TrainConfig, routes: Routes) -> list[_Training]:
    """A training for each model of the table, or for those with a rule that `--only` names."""
    if unknown := set(config.only) - {rule.name for rule in routes.rules}:
        known = ", ".join(rule.name for rule in routes.rules)
        raise WrongUse(f"--only {min(unknown)} is no rule of --routes, whose rules are {known}")
    by_model: dict[str, list[Rule]] = defaultdict(list)
    for rule in routes.rules:
        by_model[rule.model].append(rule)
    return [
        _Training.of(rules, config)
        for rules in by_model.values()
        if not config.only or {rule.name for rule in rules} & set(config.only)
    ]


def _alone(config: TrainConfig, rule: Rule) -> TrainConfig:
    """The settings of a training of one rule's model. Features are in one cache for all."""
    name = rule.name
    if "/" in name or name.startswith((".", "_")):
        raise WrongUse(f"--routes: rule {name}: its model goes to a folder of this name; choose a plain one")
    folder = config.output.rstrip("/")
    own = {"output": f"{folder}/{name}", "name": name, "work_dir": config.work_dir or f"{folder}/_work"}
    return config.model_copy(update=own | {"mask": rule.mask, "routes": None, "only": []})


@contextmanager
def _naming(rules: list[str]) -> Iterator[None]:
    """Names the rules in a WrongUse about their mask, which is a key there and no flag."""
    try:
        yield
    except WrongUse as error:
        reason = str(error).removeprefix("--")
        raise WrongUse(f"--routes: rule {', '.join(rules)}: {reason}") from None


def _apart(listed: pa.Table, routes: Routes) -> dict[str, pa.Table]:
    """The images of each rule, those of all rules of one model together; says how many have none."""
    rows: dict[str, list[int]] = defaultdict(list)
    unrouted = []
    for row, uri in enumerate(listed["image_uri"].to_pylist()):
        if routed := routes.of(uri):
            rows[routes.rules[routed[0]].model].append(row)
        else:
            unrouted.append(uri)
    if unrouted:
        warn(f"{len(unrouted)} of {listed.num_rows} images match no rule, such as {unrouted[0]}")
    return {rule.name: listed.take(pa.array(rows[rule.model], pa.int64())) for rule in routes.rules}


def _check_enough(one: _Training, images: int) -> None:
    try:
        check_enough(images)
    except WrongUse as error:
        raise WrongUse(
            f"--routes: rule {', '.join(one.rules)}: {error}; or leave it out with --only"
        ) from None
