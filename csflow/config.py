"""Settings of a job: a typed model whose field docstrings are the help text, filled from YAML and flags."""

import argparse
import json
import os
import re
import sys
import types
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from csflow import __version__
from csflow.console import Verbosity, set_verbosity
from csflow.errors import WrongUse
from csflow.flags import VERSION_HELP, FlagParser, spelling
from csflow.inputs.names import SKIPPED_FOLDERS
from csflow.redaction import HIDDEN, holds_credentials


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _json_object(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


def _moment(value: object) -> object:
    """The time that `36h` (36 hours before now) or `7d` means; other values as they are."""
    if isinstance(value, str) and (ago := re.fullmatch(r"(\d+)([hd])", value)):
        return datetime.now(UTC) - int(ago[1]) * {"h": timedelta(hours=1), "d": timedelta(days=1)}[ago[2]]
    return value


def _in_utc(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)


Locations = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_or_more)]
Patterns = Annotated[list[str], BeforeValidator(_one_or_more)]
Schemes = Annotated[
    list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*$")]], BeforeValidator(_one_or_more)
]
Stages = Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_one_or_more)]
Moment = Annotated[datetime, BeforeValidator(_moment), AfterValidator(_in_utc)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
ModelName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]
Side = Annotated[int, Field(ge=1, le=8192)]
"""Side of the images of a model, in pixels. Memory grows with its square: at the limit a backbone needs some
gigabytes for one image."""
Decode = Literal["auto", "beside", "cluster"]
"""Where images are read and decoded: `beside` the model, in its process; in the whole `cluster`, too; or,
with `auto`, in the cluster if a GPU waits for images otherwise."""
FALSE_POSITIVE_RATE = 0.01
"""Default share of normal images that may be flagged."""
FALSE_REGIONS = 0.1
"""Default number of regions that a normal image may have on average."""
StorageOptions = Annotated[dict[str, Any], BeforeValidator(_json_object)]


class JobConfig(BaseModel):
    """Base of every job's settings. The docstring under a field is its `--help` text."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True, allow_inf_nan=False)
    positional: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that are given without a flag, in their order."""

    storage_options: StorageOptions = {}
    """JSON: options of the object store client, if the AWS_* variables lack them."""


class ListingConfig(JobConfig):
    """Settings of the jobs that list images."""

    allow_schemes: Schemes = Field([])
    """Schemes that manifests may name beside those of the inputs, such as `s3` or `https`; `file` for local
    paths. [default: no others]"""
    image_column: str | None = Field(None, min_length=1)
    """Column of image bytes in Parquet files, such as `photo`, or `sample.image` for a field of a struct.
    [default: a column with a usual name, such as image or jpg, or else the only one that holds bytes]"""
    skip_folders: Patterns = Field(list(SKIPPED_FOLDERS))
    """Do not look into folders of these names, in which storage and operating systems keep thumbnails,
    deleted files and snapshots. `*` stands for any text, and case does not matter; an empty name skips none.
    Folders that begin with a dot or an underscore are never looked into."""


Config = TypeVar("Config", bound=JobConfig)

EPILOG = "Hyphens and underscores are the same in flags and in YAML: --image-size, --image_size."


def parse(
    config_type: type[Config], doc: str | None, argv: Sequence[str] | None = None, prog: str | None = None
) -> Config:
    """Reads settings from `--config` (YAML) and flags, which override it; sets how much this process prints.

    Raises:
        WrongUse: a setting is unknown, missing or out of its range.
        SystemExit: after `--help`, `--version` or `--print_config`.
    """
    flags = build_parser(config_type, doc, prog).parse(argv)
    print_config = flags.pop("print_config", False)
    set_verbosity(flags.pop("verbosity", Verbosity.NORMAL))
    config = configured(config_type, flags.pop("config", None), flags)
    if print_config:
        shown = config.model_dump(mode="json") | {
            "storage_options": dict.fromkeys(config.storage_options, HIDDEN)
        }
        print(yaml.safe_dump(shown, sort_keys=False), end="")
        raise SystemExit(0)
    return config


def configured(
    config_type: type[Config], file: str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> Config:
    """The settings in a YAML file, if there is one, overridden by these.

    Raises:
        WrongUse: a setting is unknown, missing or out of its range.
    """
    try:
        config = config_type.model_validate(_read_yaml(file) | dict(settings))
    except ValidationError as error:
        raise WrongUse("; ".join(_explain(e) for e in error.errors())) from None
    _refuse_credentials(config)
    return config


def _refuse_credentials(config: JobConfig) -> None:
    """Raises WrongUse if a location holds a secret, because locations are stored with every image."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        for url in value if isinstance(value, list) else [value]:
            if isinstance(url, str) and holds_credentials(url):
                raise WrongUse(
                    f"--{name} holds credentials in a URL; give them by the AWS_* variables, a profile, a "
                    "role, or --storage_options"
                )


def build_parser(config_type: type[JobConfig], doc: str | None, prog: str | None = None) -> FlagParser:
    """The command-line parser of a job: a flag for every field, and the flags that all jobs share."""
    prog = prog or Path(sys.argv[0]).name
    parser = FlagParser(prog=prog, description=doc, epilog=EPILOG, usage=_usage(config_type, prog))
    parser.add_argument("--version", action="version", version=f"csflow {__version__}", help=VERSION_HELP)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; a flag overrides its value.")
    parser.add_argument("--print_config", action="store_true", help="Print the settings and exit.")
    for flags, verbosity, text in (
        (("-q", "--quiet"), Verbosity.QUIET, "Print results, warnings and errors only."),
        (("-v", "--verbose"), Verbosity.VERBOSE, "Also print Ray's log and the traceback of an error."),
    ):
        parser.add_argument(*flags, dest="verbosity", action="store_const", const=verbosity, help=text)
    settings = parser.add_argument_group("settings")
    for name in setting_names(config_type):
        field = config_type.model_fields[name]
        flag, how = f"--{name}", _argument(field.annotation)
        if name in config_type.positional:
            flag, how = name, how | {"metavar": name.upper()}
            how |= {} if field.is_required() else {"nargs": "?"}
        settings.add_argument(flag, help=help_text(field).replace("%", "%%"), **how)
    return parser


def _usage(config_type: type[JobConfig], prog: str) -> str:
    """The usage line, with required settings only: all settings of a job would fill the screen."""
    words = []
    for name in setting_names(config_type):
        field = config_type.model_fields[name]
        if name in config_type.positional:
            words.append(name.upper() if field.is_required() else f"[{name.upper()}]")
        elif field.is_required():
            words.append(f"--{name} {_argument(field.annotation).get('metavar', name.upper())}")
    return " ".join([prog, *words, "[settings]"]).replace("%", "%%")


def setting_names(config_type: type[JobConfig]) -> list[str]:
    """The names of a job's settings, its own before those that jobs share."""
    shared = (JobConfig, ListingConfig)
    return sorted(config_type.model_fields, key=lambda name: [name in base.model_fields for base in shared])


def help_text(field: FieldInfo) -> str:
    """The help text of a setting with its default, in one line."""
    text = " ".join((field.description or "").split())
    if field.is_required():
        return f"{text} [required]"
    return text if "[default: " in text else f"{text} [default: {_shown(field.get_default())}]"


def _argument(annotation: Any) -> dict[str, Any]:
    """The argparse options of a field. Values stay strings here: pydantic converts and checks them."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
        origin = get_origin(annotation)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin in (list, tuple):
        return _argument(get_args(annotation)[0]) | {"nargs": "+"}
    if origin is Literal:
        return {"choices": get_args(annotation)}
    return {"metavar": {int: "N", float: "X"}.get(annotation, "TEXT")}


def _shown(default: object) -> str:
    if isinstance(default, list | tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default in (None, {}, "") else str(default)


def _read_yaml(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(os.fspath(path)).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise WrongUse(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise WrongUse(f"--config {path} must hold settings as `name: value` lines")
    settings = {spelling(str(name)): value for name, value in values.items()}
    if len(settings) < len(values):
        raise WrongUse(f"--config {path} names a setting twice, with a hyphen and with an underscore")
    return settings


def _explain(error: Any) -> str:
    name = "--" + str(error["loc"][0]) if error["loc"] else "settings"
    if error["type"] == "missing":
        return f"{name} is required; see --help"
    if error["type"] == "extra_forbidden":
        return f"{name[2:]} in --config is not a setting; see --help for their names"
    if name == "--storage_options":
        return f"{name} must be a JSON object"  # its value may hold secrets
    return f"{name}: {error['msg']} (was {error['input']!r})"
