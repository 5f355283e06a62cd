"""The models of a scoring run: finds them, and sends each image to the one that is to score it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pyarrow as pa

from csflow.calibration import Drift, drift, p_values
from csflow.errors import WrongUse
from csflow.model_directory import Calibration, ModelFiles, holds_model, read_model
from csflow.output.layout import Output, listing_folder
from csflow.promotion import is_pointer, resolve
from csflow.routes import Routes, read_routes
from csflow.scoring.config import ScoreConfig
from csflow.scoring.frozen_listing import Assigned, Listing, freeze_apart
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import Account
from csflow.scoring.plan_log import PlannedShard
from csflow.scoring.tally import Sample, Tally
from csflow.storage import Location
from csflow.uri_patterns import UriPattern

UNROUTED = "unrouted"
"""Name of the listing of images that no rule matches."""


@dataclass
class ModelRun:
    """One of a run's models, what it is to score, and what came of it. Each has a log of plans of its own."""

    directory: Location
    model: ModelFiles
    """Without its tensors, which only workers need."""
    worker_bytes: int
    outcomes: OutcomeReader
    rules: list[str] = field(default_factory=list)
    """Names of the rules that name it."""
    listing: Listing = field(init=False)
    shards: list[PlannedShard] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    account: Account = field(init=False)

    @classmethod
    def of(cls, address: Location, output: Location) -> "ModelRun":
        """Raises WrongUse as `read_model` and `resolve`."""
        directory = resolve(address)
        model = read_model(directory)
        outcomes = OutcomeReader(Output(output, model.model_id))
        return cls(directory, replace(model, state={}), model.worker_bytes, outcomes)

    @property
    def output(self) -> Output:
        return self.outcomes.output

    @property
    def is_tiled(self) -> bool:
        """Whether images are cut into tiles, which take much longer."""
        return self.model.preprocessing.tiling is not None

    @property
    def label(self) -> str:
        """The model id, with the model's name if it has one."""
        return self.model.model_id + (f" ({self.model.name})" if self.model.name else "")

    def drift(self) -> Drift | None:
        """How the scores of this run differ from those of the held-out images."""
        low_share = self.tally.p_values_below_5_percent / max(1, self.tally.scored)
        return _drift(self.tally.sample, self.model.calibration, low_share)

    def drift_by_group(self) -> dict[str, Drift]:
        """The same for each group that has held-out images of its own."""
        drifts = {}
        for group, sample in sorted(self.tally.groups.items()):
            calibration = self.model.calibration.groups[group]
            anomaly_scores = [score for score, _ in sample.values]
            p = p_values(anomaly_scores, calibration.anomaly_score, calibration.weights)
            if found := _drift(sample, calibration, float((p < 0.05).mean()), len(self.tally.groups)):
                drifts[group] = found
        return drifts


@dataclass
class BrokenModel:
    """A model that cannot be loaded, so that its images wait for another run."""

    address: Location
    reason: str
    rules: list[str] = field(default_factory=list)
    listing: Listing = field(init=False)

    def line(self) -> str:
        return f"model {self.address} of rule {', '.join(self.rules)} cannot be loaded: {self.reason}"


@dataclass
class Models:
    """All models of a run, and which images each has to score."""

    runs: list[ModelRun]
    broken: list[BrokenModel] = field(default_factory=list)
    routes: Routes | None = None
    tags: UriPattern | None = None
    """Gives the tags of all images, if there are no routes."""
    unrouted: Listing | None = None
    """The images that no rule matches."""
    _places: list[int] = field(default_factory=list)
    """By the number of a rule, the place of its model among `runs` and `broken`."""

    @classmethod
    def find(cls, config: ScoreConfig) -> "Models":
        """Reads the models that the settings name, one after the other.

        Raises:
            WrongUse: the table of routes is wrong, or one of its models does not exist; without a table, the
                model cannot be read, or the pattern of tags is wrong.
        """
        output = Location(config.output, config.storage_options)
        if config.routes is None:
            assert config.model is not None
            tags = UriPattern(config.tags) if config.tags else None
            return cls([ModelRun.of(Location(config.model, config.storage_options), output)], tags=tags)
        routes = read_routes(config.routes, config.storage_options)
        return cls._of_routes(routes, config, output)

    @classmethod
    def _of_routes(cls, routes: Routes, config: ScoreConfig, output: Location) -> "Models":
        found: dict[str, ModelRun | BrokenModel] = {}
        for rule in routes.rules:
            if rule.model not in found:
                found[rule.model] = _model(Location(rule.model, config.storage_options), output, rule.name)
        # Two addresses may hold the same model, which has one log of plans.
        by_id = {some.model.model_id: some for some in found.values() if isinstance(some, ModelRun)}
        broken = [some for some in found.values() if isinstance(some, BrokenModel)]
        places = {id(some): place for place, some in enumerate([*by_id.values(), *broken])}
        models = cls(list(by_id.values()), broken, routes)
        for rule in routes.rules:
            of_rule = found[rule.model]
            if isinstance(of_rule, ModelRun):
                of_rule = by_id[of_rule.model.model_id]
            of_rule.rules.append(rule.name)
            models._places.append(places[id(of_rule)])
        return models

    def freeze(
        self, output: Location, run_id: str, batches: Iterable[pa.RecordBatch], limit: int | None
    ) -> None:
        """Freezes what is listed, the images of each model apart, with their tags."""
        if self.routes is None:
            tags_of = self.tags.tags if self.tags else None
            self.runs[0].listing = Listing.freeze(listing_folder(output, run_id), batches, limit, tags_of)
            return
        ids = [some.model.model_id for some in self.runs]
        names = [*ids, *(f"broken-{number}" for number in range(len(self.broken))), UNROUTED]
        folders = [listing_folder(output, run_id) / name for name in names]
        *listings, self.unrouted = freeze_apart(folders, batches, limit, self._assign)
        every: list[ModelRun | BrokenModel] = [*self.runs, *self.broken]
        for some, listing in zip(every, listings, strict=True):
            some.listing = listing

    def _assign(self, image_uri: str) -> Assigned:
        assert self.routes is not None
        routed = self.routes.of(image_uri)
        if routed is None:
            return len(self.runs) + len(self.broken), None
        rule, tags = routed
        return self._places[rule], tags


def _drift(sample: Sample, calibration: Calibration, low_share: float, groups: int = 1) -> Drift | None:
    anomaly_scores, global_scores = zip(*sample.values, strict=True) if sample.values else ((), ())
    # Without whitening there is but one score.
    heldout = None if calibration.local_score is None else calibration.global_score
    both = None if heldout is None else (global_scores, heldout)
    return drift(anomaly_scores, low_share, calibration.anomaly_score, both, calibration.weights, groups)


def _model(address: Location, output: Location, rule: str) -> ModelRun | BrokenModel:
    """A rule's model. Raises WrongUse if there is none; one that cannot be read costs its own images only."""
    if not (address.exists() if is_pointer(address) else holds_model(address)):
        raise WrongUse(
            f"--routes: rule {rule}: there is no model {address}; train it, or correct the address"
        )
    try:
        return ModelRun.of(address, output)
    except WrongUse as error:
        return BrokenModel(address, str(error))
