"""The table of routes: which images of a plant go to which model, and what the plant calls them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from csflow.errors import WrongUse
from csflow.redaction import holds_credentials
from csflow.storage import Location
from csflow.uri_patterns import UriPattern, example


def _text(value: object) -> object:
    """YAML reads `line: 4` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _texts(value: object) -> object:
    return [_text(item) for item in (value if isinstance(value, list) else [value])]


Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts), Field(min_length=1)]


class Rule(BaseModel):
    """One rule of the table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Text
    """What messages call the rule."""
    images: Texts
    """Patterns of image URIs, whose names in braces become tags."""
    where: dict[str, Texts] = {}
    """The values that these tags may have."""
    tags: dict[str, Text] = {}
    """Tags that all images of the rule have."""
    model: Text
    """Model directory, or a pointer to one."""
    mask: Text | None = None
    """What the model is to look at, as `--mask` of training."""

    def patterns(self) -> list[UriPattern]:
        """The patterns with the values of `where` in them.

        Raises:
            WrongUse: a pattern is wrong, `where` names none of its tags, or `tags` one that it has.
        """
        patterns = [UriPattern(text) for text in self.images]
        for pattern in patterns:
            if unknown := [tag for tag in self.where if tag not in pattern.names]:
                known = ", ".join(pattern.names) or "none"
                raise WrongUse(f"where: {unknown[0]} is no tag of {pattern} (its tags: {known})")
            if doubled := [tag for tag in self.tags if tag in pattern.names]:
                raise WrongUse(f"tags: {doubled[0]} is a tag of {pattern}, too; drop one of them")
        return [some for pattern in patterns for some in pattern.holding(self.where)]


class Routes:
    """The rules in their order. The first rule whose pattern matches an image's URI is the image's."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Raises WrongUse, which names the rule, if one can match nothing, or if the order is a mistake."""
        self.rules = rules
        self._patterns = [_patterns(rule) for rule in rules]
        for name, times in Counter(rule.name for rule in rules).items():
            if times > 1:
                raise WrongUse(f"{times} rules have the name {name}; give each its own")
        masks: dict[str, Rule] = {}
        for later, rule in enumerate(rules):
            self._check(later, rule)
            first = masks.setdefault(rule.model, rule)
            if first.mask != rule.mask:
                raise WrongUse(
                    f"rules {first.name} and {rule.name} have one model, but not one mask; a model has one"
                )

    def of(self, image_uri: str) -> tuple[int, dict[str, str]] | None:
        """The number of an image's rule, and the image's tags; None if no rule matches."""
        for number, patterns in enumerate(self._patterns):
            for pattern in patterns:
                if (tags := pattern.tags(image_uri)) is not None:
                    return number, tags | self.rules[number].tags
        return None

    def tags_of(self, image_uri: str) -> dict[str, str] | None:
        """The tags of an image; None if no rule matches."""
        routed = self.of(image_uri)
        return routed and routed[1]

    def tags(self) -> set[str]:
        """The names of all tags."""
        names = {name for patterns in self._patterns for pattern in patterns for name in pattern.names}
        return names | {name for rule in self.rules for name in rule.tags}

    def _check(self, later: int, rule: Rule) -> None:
        patterns = self._patterns[later]
        if example(patterns) is None:
            raise WrongUse(f"rule {rule.name} can match no image: no tag in braces has a slash, as in where")
        # A narrow rule above a wide one is an exception, and meant.
        meeting = [number for number in range(later) if self._meet(number, later)]
        above = [pattern for number in meeting for pattern in self._patterns[number]]
        if above and example(patterns, but_not=above) is None:
            names = " and ".join(self.rules[number].name for number in meeting)
            raise WrongUse(
                f"rule {rule.name} can match no image: {names} above it take all of its images; put it "
                "first, or remove it"
            )
        for number in meeting:
            both = example(self._patterns[number], patterns)
            if both and example(self._patterns[number], but_not=patterns):
                raise WrongUse(
                    f"rules {self.rules[number].name} and {rule.name} both match images such as {both}, and "
                    "neither is an exception of the other; make one of them narrower"
                )

    def _meet(self, one: int, two: int) -> bool:
        """Whether some images may match both rules."""
        return any(some.may_meet(other) for some in self._patterns[one] for other in self._patterns[two])


def read_routes(table: str | Sequence[Mapping[str, Any]], storage_options: Mapping[str, Any]) -> Routes:
    """The table in a YAML file with the key `routes`, or the rules themselves, as that key has them.

    Raises:
        WrongUse: the file cannot be read, or a rule is wrong; the message names file and rule.
    """
    place = f"--routes {table}" if isinstance(table, str) else "--routes"
    try:
        content = _content(Location(table, storage_options)) if isinstance(table, str) else table
        return Routes([_rule(number, values) for number, values in enumerate(content, start=1)])
    except WrongUse as error:
        raise WrongUse(f"{place}: {error}") from None


def _content(file: Location) -> list[Any]:
    try:
        content = yaml.safe_load(file.read())
    except FileNotFoundError:
        raise WrongUse("there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongUse(f"this is no YAML: {' '.join(str(error).split())}") from None
    rules = content.get("routes") if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(rules, list) or not rules:
        raise WrongUse("the file has one key, routes, with a list of rules")
    return rules


def _rule(number: int, values: object) -> Rule:
    name = values.get("name", number) if isinstance(values, dict) else number
    try:
        rule = Rule.model_validate(values)
    except ValidationError as error:
        raise WrongUse(f"rule {name}: {'; '.join(map(_explained, error.errors()))}") from None
    if any(holds_credentials(url) for url in (rule.model, rule.mask or "", *rule.images)):
        raise WrongUse(f"rule {name} holds credentials in a URL; give them by the AWS_* variables")
    return rule


def _explained(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{place} is no key of a rule, whose keys are {', '.join(Rule.model_fields)}"
    if error["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def _patterns(rule: Rule) -> list[UriPattern]:
    try:
        return rule.patterns()
    except WrongUse as error:
        raise WrongUse(f"rule {rule.name}: {error}") from None
