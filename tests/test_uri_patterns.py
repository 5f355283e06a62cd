"""Patterns of URIs: the tags that they give, and what two patterns have in common."""

import random
from itertools import product
from pathlib import Path

import pytest

from csflow.errors import WrongUse
from csflow.uri_patterns import UriPattern, example

PLANT = UriPattern("s3://plant/{line}/{product}/{day}/{part}_{camera}.jpg")


def test_a_pattern_gives_the_parts_of_a_uri_the_names_in_its_braces() -> None:
    assert PLANT.names == ("line", "product", "day", "part", "camera")
    assert PLANT.tags("s3://plant/4/gear/2026-11-27/7_12_top.jpg") == {
        "line": "4",
        "product": "gear",
        "day": "2026-11-27",
        "part": "7_12",  # the camera has no underscore
        "camera": "top",
    }


@pytest.mark.parametrize(
    "uri",
    [
        "s3://plant/4/gear/2026-11-27/12.jpg",
        "s3://plant/4/gear/2026-11-27/morning/12_top.jpg",
        "s3://plant/4/gear//12_top.jpg",
        "s3://plant/4/gear/2026-11-27/12_top.jpg.bak",
        "s3://plant/4/gear/2026-11-27/12_topXjpg",
    ],
)
def test_a_pattern_matches_whole_uris_only(uri: str) -> None:
    assert PLANT.tags(uri) is None


def test_one_star_stays_in_a_folder_and_two_stars_do_not() -> None:
    assert UriPattern("s3://a/*/{name}").tags("s3://a/b/c") == {"name": "c"}
    assert UriPattern("s3://a/*/{name}").tags("s3://a/b/c/d") is None
    assert UriPattern("s3://a/**/{name}").tags("s3://a/b/c/d") == {"name": "d"}
    assert UriPattern("**").tags("s3://a/b\nc") == {}


def test_a_pattern_is_absolute_as_the_uris_of_a_listing_are(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert UriPattern("data/{name}.png").tags(f"{tmp_path}/data/1.png") == {"name": "1"}
    assert UriPattern("s3a://plant/{name}").tags("s3://plant/1") == {"name": "1"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://a/{line", "name of a tag stands in braces"),
        ("s3://a/{}/b", "name of a tag stands in braces"),
        ("s3://a/{my line}/b", "name of a tag stands in braces"),
        ("s3://a/{line}{day}.png", "side by side"),
        ("s3://a/{line}/{line}.png", "the tag line twice"),
    ],
)
def test_a_pattern_with_wrong_braces_is_refused_as_it_was_written(text: str, said: str) -> None:
    with pytest.raises(WrongUse, match=said) as refused:
        UriPattern(text)
    assert text in str(refused.value)


def test_a_pattern_with_fixed_values_matches_these_alone() -> None:
    tops = PLANT.holding({"camera": ["top", "side"], "line": ["4"]})
    assert [pattern.tags("s3://plant/4/gear/1/2_side.jpg") is not None for pattern in tops] == [False, True]
    assert not any(pattern.tags("s3://plant/5/gear/1/2_side.jpg") for pattern in tops)


@pytest.mark.parametrize("seed", range(4))
def test_examples_are_those_of_trying_all_short_uris(seed: int) -> None:
    chance = random.Random(seed)
    texts = ["s://" + "".join(some) for length in range(6) for some in product("ab/", repeat=length)]
    pieces = ["a", "b", "/", "*", "**", "{tag}a", "b{tag}"]

    def pattern() -> UriPattern:
        text = "s://" + "".join(chance.choices(pieces, k=chance.randrange(5)))
        first, *others = text.split("{tag}")
        return UriPattern(f"{first}{'{tag}' if others else ''}{'*'.join(others)}")

    for _ in range(40):
        one, two = pattern(), pattern()
        matched, also = ({text for text in texts if some.tags(text) is not None} for some in (one, two))
        for found, expected in (
            (example([one], [two]), matched & also),
            (example([one], but_not=[two]), matched - also),
        ):
            # A pattern may match longer URIs only.
            assert expected if found and len(found) <= 9 else not expected
            assert not expected or (found and len(found) == min(map(len, expected)))
