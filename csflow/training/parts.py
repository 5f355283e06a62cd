"""What the tags of a training's images tell: which show the same part (`--part`), and the group of each
(`--calibrate_by`)."""

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from csflow.calibration import heldout_for
from csflow.config import FALSE_POSITIVE_RATE
from csflow.console import warn
from csflow.errors import WrongUse
from csflow.model_directory import by_group
from csflow.training.config import TrainConfig
from csflow.training.split import TrainingData, count_units, unit_of
from csflow.uri_patterns import UriPattern

TagsOf = Callable[[str], Mapping[str, str] | None]
"""The tags of an image by its URI; None if no pattern matches it."""


def pattern_of(tags: str | None, part: Sequence[str], calibrate_by: str | None) -> UriPattern | None:
    """The pattern of `--tags`, which gives the tags that the other settings name; None without all of them.

    Raises:
        WrongUse: the pattern is missing, of no use, or wrong, or lacks a tag.
    """
    if tags is None:
        if part or calibrate_by:
            setting = "part" if part else "calibrate_by"
            raise WrongUse(f"--{setting} names tags of images, and needs the pattern that gives them: --tags")
        return None
    if not part and not calibrate_by:
        raise WrongUse("--tags gives tags for --part and --calibrate_by; give one, or leave --tags out")
    pattern = UriPattern(tags)
    check_tags(part, calibrate_by, pattern.names, f"--tags {pattern}")
    return pattern


def check_tags(part: Sequence[str], calibrate_by: str | None, known: Sequence[str], where: str) -> None:
    """Raises WrongUse if a setting names a tag that there is not."""
    for setting, names in (("part", part), ("calibrate_by", [calibrate_by] if calibrate_by else [])):
        if unknown := [tag for tag in names if tag not in known]:
            raise WrongUse(
                f"--{setting}: {unknown[0]} is no tag of {where} (its tags: {', '.join(known) or 'none'})"
            )


def with_tags(images: pa.Table, tags_of: TagsOf, part: Sequence[str], calibrate_by: str | None) -> pa.Table:
    """The images with the columns `part` and `group`, as far as settings ask for them.

    A part is named by the values of its tags; an image without them is a part of its own, named by its URI. A
    group is named as in `camera=top`, and null for an image without the tag.

    Raises:
        WrongUse: no image has the tags.
    """
    uris = images["image_uri"].to_pylist()
    tags = [tags_of(uri) or {} for uri in uris]
    if part:
        has = _have(part, tags, uris, "--part", "each counts as a part of its own")
        parts = [
            "/".join(of_image[name] for name in part) if has_part else uri
            for uri, of_image, has_part in zip(uris, tags, has, strict=True)
        ]
        images = images.append_column("part", pa.array(parts, pa.string()))
    if calibrate_by:
        has = _have([calibrate_by], tags, uris, "--calibrate_by", "they are calibrated with the whole")
        groups = [
            f"{calibrate_by}={of_image[calibrate_by]}" if has_group else None
            for of_image, has_group in zip(tags, has, strict=True)
        ]
        images = images.append_column("group", pa.array(groups, pa.string()))
    return images


def _have(
    names: Sequence[str], tags: Sequence[Mapping[str, str]], uris: Sequence[str], setting: str, otherwise: str
) -> list[bool]:
    """Whether each image has all of these tags; warns of those that have not."""
    has = [all(name in of_image for name in names) for of_image in tags]
    if lacking := [uri for uri, has_all in zip(uris, has, strict=True) if not has_all]:
        shown = " and ".join(names)
        if len(lacking) == len(uris):
            raise WrongUse(f"{setting}: none of the images has the tag {shown}, such as {lacking[0]}")
        warn(f"{len(lacking)} of {len(uris)} images have no tag {shown}, such as {lacking[0]}; {otherwise}")
    return has


def with_own_calibration(calibration: pa.Table) -> tuple[pa.Table, str]:
    """The held-out images, with `group` null where a group has too few; and what became of each group.

    A group is calibrated apart if it has so many that an image can be flagged at the usual rate.
    """
    needed, unit = heldout_for(FALSE_POSITIVE_RATE), unit_of(calibration)
    sizes = {group: count_units(own) for group, own in sorted(by_group(calibration).items())}
    apart = {group for group, size in sizes.items() if size >= needed}
    shown = {group: f"{group} ({size} held-out {unit})" for group, size in sizes.items()}
    lines = [f"calibrated apart: {', '.join(shown[group] for group in sizes if group in apart) or 'none'}"]
    if few := [shown[group] for group in sizes if group not in apart]:
        lines.append(f"compared with all, since it takes {needed}: {', '.join(few)}")
    groups = [group if group in apart else None for group in calibration["group"].to_pylist()]
    place = calibration.schema.get_field_index("group")
    return calibration.set_column(place, "group", pa.array(groups, pa.string())), "; ".join(lines)


def divided(cached: pa.Table, images: pa.Table, config: TrainConfig) -> TrainingData:
    """The listed images, divided as the settings say. Raises WrongUse as `TrainingData.divide`.

    Args:
        cached: their rows in the `INDEX` schema.
        images: with the column `part`, if parts are known.
    """
    is_cross = config.calibration == "cross"
    part_of = by_uri(images, "part")
    return TrainingData.divide(cached, config.validation, config.holdout, config.seed, is_cross, part_of)


def by_uri(images: pa.Table, column: str) -> dict[str, str] | None:
    """The column's value of each image; None if there is no such column."""
    if column not in images.schema.names:
        return None
    return dict(zip(images["image_uri"].to_pylist(), images[column].to_pylist(), strict=True))
