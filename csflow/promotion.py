"""A pointer names the model in use in one small file, so that nights can change to a model, and back.

Beside the pointer lies its history, a create-only file for each change. If two promote at the same time, both
are in the history, and the pointer names the later one.
"""

import getpass
import socket
from datetime import UTC, datetime
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from csflow.config import JobConfig
from csflow.errors import ExitStatus, WrongUse
from csflow.model_directory import read_config, read_model
from csflow.storage import Location

FORMAT_VERSION = 1
"""Grows when a key is renamed, removed or changes its meaning."""
SUFFIX = ".json"
"""By it, --model knows a pointer from a model directory."""


class PromoteConfig(JobConfig):
    """Settings of `csflow promote`."""

    positional: ClassVar[tuple[str, ...]] = ("model", "pointer")

    model: str | None = None
    """Model directory that is to be used from now on."""
    pointer: str | None = None
    """File that names the model in use, such as s3://plant/models/current.json; --model takes it."""
    back: str | None = None
    """Pointer that is to name the model before again; once more for the one before that."""
    by: str | None = None
    """Who promotes the model. [default: user and host]"""


class Promotion(BaseModel):
    """The content of a pointer, and of each file of its history."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    number: int
    """Number in the history, from 1."""
    before: int | None
    """Number of the promotion that `--back` returns to; None if there was no model before."""
    model: str
    """Address of the model directory."""
    model_id: str
    promoted_at: datetime
    promoted_by: str

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


def promote(config: PromoteConfig) -> ExitStatus:
    """Points at a model, or back at the one before.

    Raises:
        WrongUse: there is no whole model, no pointer, or no model before.
    """
    by = config.by or f"{getpass.getuser()}@{socket.gethostname()}"
    if config.back is not None:
        if config.model is not None:
            raise WrongUse("--back takes the pointer alone: csflow promote --back POINTER")
        done = _go_back(Pointer(_pointer(config, config.back)), by)
    elif config.model is None or config.pointer is None:
        raise WrongUse("a model and a pointer are needed: csflow promote MODEL POINTER")
    else:
        model = Location(config.model, config.storage_options)
        done = _promote(Pointer(_pointer(config, config.pointer)), model, by)
    print(f"{config.back or config.pointer} names {done.model}, model_id {done.model_id}")
    return ExitStatus.DONE


def resolve(model: Location) -> Location:
    """The model directory that `--model` means: the location itself, or what a pointer names.

    Raises:
        WrongUse: the pointer does not exist, is damaged, or the directory holds another model than it names.
    """
    if not is_pointer(model):
        return model
    promotion = _read(model)
    if promotion is None:
        raise WrongUse(f"{model} does not exist; `csflow promote MODEL {model}` makes it")
    directory = Location(promotion.model, model.storage_options)
    found = read_config(directory)["model_id"]
    if found != promotion.model_id:
        raise WrongUse(
            f"{model} names model_id {promotion.model_id}, but {directory} now holds {found}; promote it "
            "again, and train into a new directory next time"
        )
    return directory


def is_pointer(location: Location) -> bool:
    """Whether a location is a pointer, by its name."""
    return location.name.endswith(SUFFIX)


class Pointer:
    """A pointer with its history."""

    def __init__(self, file: Location) -> None:
        self.file = file
        self._history = file.parent / f"{file.name.removesuffix(SUFFIX)}.history"

    def promotions(self) -> list[Promotion]:
        """All promotions, oldest first. Raises WrongUse if one of them cannot be read."""
        found = (_read(file) for file in self._history.find(SUFFIX))
        return [promotion for promotion in found if promotion]

    def add(self, last: int, before: int | None, model: Location, model_id: str, by: str) -> Promotion:
        """Adds a promotion after number `last`, and points at the newest one.

        Raises:
            FileExistsError: somebody else has added one after `last`.
        """
        added = newest = Promotion(
            number=last + 1,
            before=before,
            model=model.url,
            model_id=model_id,
            promoted_at=datetime.now(UTC),
            promoted_by=by,
        )
        (self._history / f"{added.number:06d}{SUFFIX}").create(added.to_bytes())
        # Whoever writes the pointer last sees what others have added until then, and writes that.
        while True:
            self.file.write(newest.to_bytes())
            latest = self.promotions()[-1]
            if latest.number <= newest.number:
                return added
            newest = latest


def _promote(pointer: Pointer, model: Location, by: str) -> Promotion:
    model_id = read_model(model).model_id
    while True:
        history = pointer.promotions()
        last = history[-1].number if history else 0
        try:
            return pointer.add(last, last or None, model, model_id, by)
        except FileExistsError:
            continue  # another was promoted meanwhile, and is the one before this


def _go_back(pointer: Pointer, by: str) -> Promotion:
    while True:
        history = {promotion.number: promotion for promotion in pointer.promotions()}
        if not history:
            raise WrongUse(f"{pointer.file} is no pointer; `csflow promote MODEL {pointer.file}` makes one")
        last = history[max(history)]
        target = history.get(last.before or 0)
        if target is None:
            raise WrongUse(f"{pointer.file} has named no other model before {last.model}")
        model = Location(target.model, pointer.file.storage_options)
        model_id = read_model(model).model_id
        try:
            return pointer.add(last.number, target.before, model, model_id, by)
        except FileExistsError:
            continue


def _pointer(config: PromoteConfig, url: str) -> Location:
    location = Location(url, config.storage_options)
    if not is_pointer(location):
        raise WrongUse(
            f"{url} is no name of a pointer, which ends with {SUFFIX}; use {url.rstrip('/')}{SUFFIX}"
        )
    return location


def _read(file: Location) -> Promotion | None:
    """The content of a pointer or of a file of its history; None if there is no such file."""
    try:
        promotion = Promotion.model_validate_json(file.read())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise WrongUse(f"{file} is no pointer ({reason}); promote a model to write it anew") from None
    if promotion.format_version > FORMAT_VERSION:
        raise WrongUse(f"{file} has format version {promotion.format_version}; use a newer csflow")
    return promotion
