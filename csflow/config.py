"""Settings of a job: a typed model whose field docstrings are the help text, filled from YAML and flags."""

import argparse
import json
import os
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from csflow.errors import ExitStatus, WrongUse
from csflow.redaction import HIDDEN, holds_credentials, redact


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _json_object(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


Locations = Annotated[list[str], BeforeValidator(_one_or_more)]
StorageOptions = Annotated[dict[str, Any], BeforeValidator(_json_object)]


class JobConfig(BaseModel):
    """Base of every job's settings. The docstring under a field is its `--help` text."""

    model_config = ConfigDict(
        use_attribute_docstrings=True, extra="forbid", frozen=True, protected_namespaces=()
    )

    storage_options: StorageOptions = {}
    """Options of the object store client as JSON, for what the AWS_* variables do not say."""


Config = TypeVar("Config", bound=JobConfig)


def run_job(config_type: type[Config], main: Callable[[Config], ExitStatus], doc: str | None) -> None:
    """Parses the command line, runs `main` and leaves the process with its exit status.

    A `WrongUse` raised anywhere becomes exit status 2 and its one line on standard error. What goes there is
    without secrets.
    """
    options: dict[str, Any] = {}
    try:
        config = parse(config_type, doc)
        options = config.storage_options
        status = main(config)
    except WrongUse as error:
        print(f"error: {redact(' '.join(str(error).split()), options)}", file=sys.stderr)
        status = ExitStatus.WRONG_USE
    except Exception as error:
        print(redact("".join(traceback.format_exception(error)), options), end="", file=sys.stderr)
        status = ExitStatus.FAILED
    sys.stdout.flush()
    sys.exit(int(status))


def parse(config_type: type[Config], doc: str | None, argv: Sequence[str] | None = None) -> Config:
    """Settings from `--config` (YAML) and flags; flags win.

    Raises:
        WrongUse: a setting is unknown, missing or out of its range.
        SystemExit: after `--help` or `--print_config`.
    """
    parser = _build_parser(config_type, doc)
    flags = vars(parser.parse_args(argv))
    print_config = flags.pop("print_config", False)
    values = _read_yaml(flags.pop("config", None)) | flags
    try:
        config = config_type.model_validate(values)
    except ValidationError as error:
        raise WrongUse("; ".join(_explain(e) for e in error.errors())) from None
    _refuse_credentials(config)
    if print_config:
        shown = config.model_dump(mode="json") | {
            "storage_options": dict.fromkeys(config.storage_options, HIDDEN)
        }
        print(yaml.safe_dump(shown, sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _refuse_credentials(config: JobConfig) -> None:
    """Locations are written down with every image, so none may hold a secret."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        for url in value if isinstance(value, list) else [value]:
            if isinstance(url, str) and holds_credentials(url):
                raise WrongUse(
                    f"--{name} holds credentials in a URL; give them by the AWS_* variables, a profile, "
                    "a role, or --storage_options"
                )


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise WrongUse(f"{message}; see {Path(self.prog).name} --help")


def _build_parser(config_type: type[JobConfig], doc: str | None) -> argparse.ArgumentParser:
    parser = _OneLineParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags win over it.")
    parser.add_argument("--print_config", action="store_true", help="Print the settings and exit.")
    own_first = sorted(config_type.model_fields, key=lambda name: name in JobConfig.model_fields)
    for name in own_first:
        field = config_type.model_fields[name]
        text = " ".join((field.description or "").split())
        if field.is_required():
            text += " [required]"
        elif "[default: " not in text:
            text += f" [default: {_shown(field.get_default())}]"
        parser.add_argument(f"--{name}", help=text.replace("%", "%%"), **_argument(field.annotation))
    return parser


def _argument(annotation: Any) -> dict[str, Any]:
    """How argparse takes a field: pydantic converts and checks the value, so words stay words here."""
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


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(os.fspath(path)).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise WrongUse(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise WrongUse(f"--config {path} must hold settings as `name: value` lines")
    return values


def _explain(error: Any) -> str:
    name = "--" + str(error["loc"][0]) if error["loc"] else "settings"
    if error["type"] == "missing":
        return f"{name} is required; see --help"
    if error["type"] == "extra_forbidden":
        return f"{name[2:]} in --config is not a setting; see --help for their names"
    if name == "--storage_options":
        return f"{name} must be a JSON object"  # its value may hold secrets
    return f"{name}: {error['msg']} (was {error['input']!r})"
