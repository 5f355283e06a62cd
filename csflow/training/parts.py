"""Which images of a training show the same part, as their tags tell (`--part`)."""

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from csflow.console import warn
from csflow.errors import WrongUse
from csflow.training.config import TrainConfig
from csflow.training.split import TrainingData
from csflow.uri_patterns import UriPattern

TagsOf = Callable[[str], Mapping[str, str] | None]
"""The tags of an image by its URI; None if no pattern matches it."""


def pattern_of(tags: str | None, part: Sequence[str]) -> UriPattern | None:
    """The pattern of `--tags`, which gives the tags that `--part` names; None without both.

    Raises:
        WrongUse: one is given without the other, the pattern is wrong, or lacks a tag.
    """
    if tags is None:
        if part:
            raise WrongUse("--part names tags of images, and needs the pattern that gives them: --tags")
        return None
    if not part:
        raise WrongUse("--tags gives tags for --part; name one of them with --part, or leave --tags out")
    pattern = UriPattern(tags)
    check_tags(part, pattern.names, f"--tags {pattern}")
    return pattern


def check_tags(part: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raises WrongUse if `--part` names a tag that there is not."""
    if unknown := [tag for tag in part if tag not in known]:
        raise WrongUse(f"--part: {unknown[0]} is no tag of {where} (its tags: {', '.join(known) or 'none'})")


def with_parts(images: pa.Table, tags_of: TagsOf, names: Sequence[str]) -> pa.Table:
    """The images with a column `part`: the values of the tags of these names, or else the image's own URI.

    Raises:
        WrongUse: no image has these tags.
    """
    uris = images["image_uri"].to_pylist()
    tags = [tags_of(uri) or {} for uri in uris]
    has_part = [all(name in of_image for name in names) for of_image in tags]
    if unknown := [uri for uri, has in zip(uris, has_part, strict=True) if not has]:
        shown = " and ".join(names)
        if len(unknown) == len(uris):
            raise WrongUse(f"--part: none of the images has the tag {shown}, such as {unknown[0]}")
        warn(
            f"{len(unknown)} of {len(uris)} images have no tag {shown}, such as {unknown[0]}; each counts as "
            "a part of its own"
        )
    parts = [
        "/".join(of_image[name] for name in names) if has else uri
        for uri, of_image, has in zip(uris, tags, has_part, strict=True)
    ]
    return images.append_column("part", pa.array(parts, pa.string()))


def divided(cached: pa.Table, images: pa.Table, config: TrainConfig) -> TrainingData:
    """The listed images, divided as the settings say. Raises WrongUse as `TrainingData.divide`.

    Args:
        cached: their rows in the `INDEX` schema.
        images: with the column `part`, if parts are known.
    """
    part_of = None
    if "part" in images.schema.names:
        part_of = dict(zip(images["image_uri"].to_pylist(), images["part"].to_pylist(), strict=True))
    is_cross = config.calibration == "cross"
    return TrainingData.divide(cached, config.validation, config.holdout, config.seed, is_cross, part_of)
