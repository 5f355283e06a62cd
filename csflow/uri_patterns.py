"""Patterns of image URIs as a person writes them: `s3://plant/{line}/{day}/{part}_{camera}.jpg`.

`{name}` is any text without a slash, at least one character, and gives it the name; `*` is any text without a
slash, `**` any text. A pattern is one of a whole URI. Where a URI fits in several ways, earlier parts of the
pattern take as much as they can: in `{part}_{camera}` the camera has no underscore.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import product
from typing import Literal, NamedTuple

from csflow.errors import WrongUse
from csflow.inputs.manifests import canonical_uri

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(r"\{([^{}]*)\}|(\*\*)|(\*)|([{}])|([^{}*]+)")
_OTHER = "\0"
"""Stands for all characters that two patterns do not name."""


class _Token(NamedTuple):
    """A text, a wildcard, or a tag, which has a name and maybe a fixed text."""

    kind: Literal["text", "*", "**", "tag"]
    text: str = ""
    name: str = ""

    @property
    def is_literal(self) -> bool:
        return bool(self.text)

    def expression(self) -> str:
        wild = {"**": ".*", "*": "[^/]*"}.get(self.kind, "[^/]+")
        expression = re.escape(self.text) if self.is_literal else wild
        return f"(?P<{self.name}>{expression})" if self.name else expression


class _Step(NamedTuple):
    """One character of a pattern, or a wildcard, which may go on for several characters."""

    literal: str | None
    """The character; None for a wildcard."""
    crosses_slashes: bool = False
    is_optional: bool = False

    def takes(self, character: str) -> bool:
        if self.literal is None:
            return self.crosses_slashes or character != "/"
        return character == self.literal


class UriPattern:
    """A pattern of whole image URIs, whose named parts become tags."""

    def __init__(self, text: str) -> None:
        """Raises WrongUse if the braces or the names in them are wrong."""
        self.text = text
        # URIs of a listing are absolute, and so is a pattern, unless it begins with any text.
        absolute = text if text.startswith("*") else canonical_uri(text)
        self._tokens = list(_tokens(absolute, text))
        self.names = tuple(token.name for token in self._tokens if token.name)
        """The tags that it gives."""

    def tags(self, image_uri: str) -> dict[str, str] | None:
        """The tags of an image; None if the pattern does not match its URI."""
        match = self._regex.fullmatch(image_uri)
        return match.groupdict() if match else None

    def holding(self, values: Mapping[str, Sequence[str]]) -> "list[UriPattern]":
        """Patterns that together match the URIs whose tags have one of these values each."""
        names = [name for name in self.names if name in values]
        fitting = ([value for value in values[name] if "/" not in value] for name in names)
        return [self._with(dict(zip(names, some, strict=True))) for some in product(*fitting)]

    def _with(self, values: Mapping[str, str]) -> "UriPattern":
        """The pattern with these texts in place of these names."""
        other = UriPattern.__new__(UriPattern)
        other.text, other.names = self.text, self.names
        other._tokens = [token._replace(text=values.get(token.name, token.text)) for token in self._tokens]
        return other

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile("".join(token.expression() for token in self._tokens), re.DOTALL)

    @cached_property
    def _steps(self) -> list[_Step]:
        """The pattern character by character."""
        steps: list[_Step] = []
        for token in self._tokens:
            wildcard = _Step(None, crosses_slashes=token.kind == "**", is_optional=token.kind != "tag")
            steps += [_Step(character) for character in token.text] or [wildcard]
        return steps

    @cached_property
    def _folders(self) -> "list[tuple[_Step, ...]] | None":
        """The steps between slashes; None if a wildcard may go on over slashes."""
        if any(step.crosses_slashes for step in self._steps):
            return None
        ends = [place for place, step in enumerate(self._steps) if step.literal == "/"]
        return [
            tuple(self._steps[start:end])
            for start, end in zip([0, *(end + 1 for end in ends)], [*ends, None], strict=True)
        ]

    def may_meet(self, other: "UriPattern") -> bool:
        """False if no URI can match both; quicker than to look for one, where tags stay between slashes."""
        if self._folders is None or other._folders is None:
            return True
        if len(self._folders) != len(other._folders):
            return False
        return all(map(_have_in_common, self._folders, other._folders))

    def __str__(self) -> str:
        return self.text


def example(
    matched: Sequence[UriPattern],
    also: Sequence[UriPattern] | None = None,
    but_not: Sequence[UriPattern] = (),
) -> str | None:
    """A shortest URI that some of `matched` match, some of `also` if they are given, and none of `but_not`.

    None if there is no such URI. It is searched for among the states of the patterns' automata.
    """
    sets = [matched, but_not, *([] if also is None else [also])]
    return _example([_Automaton([pattern._steps for pattern in some]) for some in sets])


@cache
def _have_in_common(one: tuple[_Step, ...], two: tuple[_Step, ...]) -> bool:
    return _example([_Automaton([one]), _Automaton([]), _Automaton([two])]) is not None


def _example(groups: "Sequence[_Automaton]") -> str | None:
    """A shortest text that all automata accept, but the second one does not."""
    named = set().union(*(group.alphabet for group in groups))
    alphabet = [_OTHER, "/", *sorted(named - {"/"})]
    start = tuple(group.start for group in groups)
    came: dict[tuple[_State, ...], tuple[tuple[_State, ...], str] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        states = waiting.popleft()
        is_in = [group.accepts(state) for group, state in zip(groups, states, strict=True)]
        if is_in[0] and not is_in[1] and all(is_in[2:]):
            return _spelled(states, came)
        for character in alphabet:
            after = tuple(group.after(state, character) for group, state in zip(groups, states, strict=True))
            if after not in came and after[0] and all(after[2:]):
                came[after] = states, character
                waiting.append(after)
    return None


_State = frozenset[tuple[int, int]]


class _Automaton:
    """Several patterns as one automaton. A state has the places (pattern, step) that a text may lead to."""

    def __init__(self, patterns: Sequence[Sequence[_Step]]) -> None:
        self._steps = patterns
        literals = (step.literal for steps in self._steps for step in steps)
        self.alphabet = {literal for literal in literals if literal is not None}
        self.start = self._closed((number, 0) for number in range(len(patterns)))

    def after(self, state: _State, character: str) -> _State:
        return self._closed(
            place
            for number, at in state
            if at < len(self._steps[number]) and (step := self._steps[number][at]).takes(character)
            # A wildcard may end here, or go on.
            for place in (
                [(number, at + 1)] if step.literal is not None else [(number, at), (number, at + 1)]
            )
        )

    def accepts(self, state: _State) -> bool:
        return any(at == len(self._steps[number]) for number, at in state)

    def _closed(self, places: Iterable[tuple[int, int]]) -> _State:
        found: set[tuple[int, int]] = set()
        for number, at in places:
            found.add((number, at))
            while at < len(self._steps[number]) and self._steps[number][at].is_optional:
                at += 1
                found.add((number, at))
        return frozenset(found)


def _spelled(
    states: tuple[_State, ...], came: Mapping[tuple[_State, ...], tuple[tuple[_State, ...], str] | None]
) -> str:
    characters = []
    while step := came[states]:
        states, character = step
        characters.append("x" if character == _OTHER else character)
    return "".join(reversed(characters))


def _tokens(absolute: str, text: str) -> Iterator[_Token]:
    """The parts of a pattern. Raises WrongUse, with the text as it was written."""
    before = _Token("text")
    names: set[str] = set()
    for match in _TOKEN.finditer(absolute):
        name, doubled, _, brace, literal = match.groups()
        if brace or (name is not None and not _NAME.fullmatch(name)):
            raise WrongUse(
                f"{text}: the name of a tag stands in braces, such as {{line}}, and has letters, digits and "
                "underscores"
            )
        if name in names:
            raise WrongUse(f"{text} has the tag {name} twice; write * for the second")
        if name:
            token = _Token("tag", name=name)
            names.add(name)
        else:
            token = _Token("text", literal) if literal else _Token("**" if doubled else "*")
        if before.kind == token.kind == "tag":
            raise WrongUse(f"{text}: two tags stand side by side; put text between them")
        yield token
        before = token
