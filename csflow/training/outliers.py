"""Ranks training images by how unlike the others they are, lists them, and trims them on demand.

A Gaussian fitted to a defect finds it a little more usual. So images are dealt into folds, and each image is
scored by a Gaussian that is fitted to the other folds. If the model sees tiles, an image is as unusual as its
most unusual tile.

Dimension letters: N images or tiles, H height, W width.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from torch import Tensor

from csflow.cluster import run_task
from csflow.console import warn
from csflow.errors import ImageError
from csflow.inputs.reading import ImageReader
from csflow.model import Gaussians
from csflow.overlays import READ_DEADLINE_S, read_image
from csflow.storage import Location, read_parquet, to_parquet
from csflow.training.cache import FeatureCache
from csflow.training.gaussians import (
    fit_gaussians,
    fold_batches,
    fold_moments,
    gaussian_energies,
    gaussian_scores,
    gaussian_statistic,
    gaussians_of_folds,
    image_numbers,
    read_gaussians,
    write_gaussians,
)
from csflow.training.shards import fingerprint
from csflow.training.sources import FeatureSource, open_features
from csflow.training.split import FEWEST_TRAINING

FOLDS = 4
USUAL_IMAGES = 1000
"""Number of images or tiles that define what is usual: a random sample, since images are in order of a
hash."""
LISTED = 12
"""Number of outliers in the model card."""
THUMBNAIL_SIDE = 160
"""Side of the small pictures in pixels."""
SCORE = "leave_out_score"
"""The score's column in a ranking."""


class ClosedForm:
    """The ranking of training images and the Gaussians of the kept ones, in files named by their inputs."""

    def __init__(self, folder: Location, cache: FeatureCache, images: pa.Table, trim: float) -> None:
        """
        Args:
            images: the training images, rows in the `INDEX` schema.
            trim: share of them to leave out.
        """
        decides = [
            cache.folder.name,
            fingerprint(images["content_digest"].to_pylist(), images["dtype"].to_pylist()),
        ]
        name = hashlib.sha256(json.dumps([*decides, trim]).encode()).hexdigest()[:16]
        self.gaussians = folder / f"{name}.gaussians.safetensors"
        self._ranking = folder / f"{name}.ranking.parquet"
        self._cache, self._images, self._trim = cache, images, trim

    def fit(self, resume: bool) -> pa.Table:
        """Fits on one CPU of the cluster, for any number of training workers, and writes `gaussians`.

        Args:
            resume: read what an earlier run has written.

        Returns:
            The images with their `SCORE`, highest first.
        """
        if not (resume and self._is_kept()):
            run_task(_write, self._cache, self._images, self._trim, self._ranking, self.gaussians)
        return read_parquet(self._ranking)

    def found(self) -> pa.Table | None:
        """What `fit` has returned in an earlier run; None if there was none, or its file is damaged."""
        try:
            return read_parquet(self._ranking)
        except (FileNotFoundError, pa.ArrowException):
            return None

    def _is_kept(self) -> bool:
        """Whether an earlier run has written both files, and they can be read; warns if they are damaged."""
        if not self.gaussians.exists():
            return False
        with contextlib.suppress(SafetensorError, RuntimeError):
            read_gaussians(self.gaussians, self._cache, torch.device("cpu"))
            if self.found() is not None:
                return True
        warn(f"{self.gaussians} or the ranking beside it is damaged; both are made again")
        return False


def trimmed_count(images: int, trim: float) -> int:
    """The number of training images in a share: at least one if the share is not 0, but enough are left."""
    return min(max(0, images - FEWEST_TRAINING), max(1, round(images * trim))) if trim else 0


def trimmed_images(ranking: pa.Table, trim: float) -> list[str]:
    """The content digests of this share of a ranking, from its top."""
    digests: list[str] = ranking["content_digest"].to_pylist()
    return digests[: trimmed_count(ranking.num_rows, trim)]


def leave_out_gaussians(
    source: FeatureSource, tile_counts: Sequence[int] | None = None
) -> tuple[Gaussians, list[Gaussians]]:
    """The Gaussians of all images, and of all images outside each fold."""
    images = len(source) if tile_counts is None else len(tile_counts)
    folds = fold_moments(source, min(FOLDS, images), tile_counts)
    # One image alone has no others to be compared with.
    others = [[*folds[:k], *folds[k + 1 :]] or folds for k in range(len(folds))]
    return gaussians_of_folds(folds), [gaussians_of_folds(some) for some in others]


def leave_out_scores(
    source: FeatureSource, gaussians: Sequence[Gaussians], tile_counts: Sequence[int] | None = None
) -> Tensor:
    """The anomaly score of each image by that of `gaussians` which has not seen it; 1 is usual."""
    image_N = image_numbers(len(source), tile_counts)
    sample = list(_energies(source, gaussians, image_N[:USUAL_IMAGES]))
    usual = [torch.cat(maps) for maps in zip(*(energies for _, energies in sample), strict=True)]
    statistic = gaussian_statistic(usual, source.feature_shapes, tile_counts is not None)
    scores_N = torch.empty(len(source))
    others = _energies(source, gaussians, image_N[USUAL_IMAGES:], USUAL_IMAGES)
    for share, energies in itertools.chain(sample, others):
        scores_N[share] = gaussian_scores(statistic, energies)
    if tile_counts is None:
        return scores_N
    return torch.stack([of_image.max() for of_image in scores_N.split(list(tile_counts))])


def outlier_files(
    ranking: pa.Table, trimmed: int, storage_options: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The list of outliers for the model card, and the files beside the card by name.

    Args:
        ranking: training images, highest `SCORE` first.
        trimmed: how many of them were left out.

    Returns:
        Rows of `image_uri`, `score`, `trimmed` and `thumbnail` (a file name, or None if the image can no
        longer be read); and the thumbnails and the manifest `outliers.csv`.
    """
    reader = ImageReader(storage_options, deadline_s=READ_DEADLINE_S)
    rows: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for number, image in enumerate(ranking.slice(0, LISTED).to_pylist(), start=1):
        name = f"outliers/{number:02}.jpg"
        with contextlib.suppress(ImageError):
            files[name] = _thumbnail(image, reader)
        rows.append(
            {
                "image_uri": image["image_uri"],
                "score": image[SCORE],
                "trimmed": number <= trimmed,
                "thumbnail": name if name in files else None,
            }
        )
    files["outliers.csv"] = _manifest(ranking.slice(0, max(LISTED, trimmed)), trimmed)
    return rows, files


def _write(
    device: torch.device,
    cache: FeatureCache,
    images: pa.Table,
    trim: float,
    ranking: Location,
    location: Location,
) -> None:
    """Writes the ranking of these images, then the Gaussians of the kept ones."""

    def source(some: pa.Table) -> FeatureSource:
        # Streamed: features may be more than one worker holds.
        return open_features(cache, some, memory_bytes=0, device=device)

    tile_counts = cache.tile_counts(images)
    gaussians, of_others = leave_out_gaussians(source(images), tile_counts)
    scores_N = leave_out_scores(source(images), of_others, tile_counts)
    order_N = scores_N.argsort(descending=True, stable=True)
    scored = images.append_column(SCORE, pa.array(scores_N.double().numpy()))
    ranking.write(to_parquet(scored.take(pa.array(order_N.numpy()))))
    trimmed = trimmed_count(len(order_N), trim)
    if trimmed:
        kept_N = order_N[trimmed:].sort().values
        kept = images.take(pa.array(kept_N.numpy()))
        gaussians = fit_gaussians(source(kept), cache.tile_counts(kept))
    write_gaussians(gaussians, location)


def _energies(
    source: FeatureSource, gaussians: Sequence[Gaussians], image_N: Tensor, first: int = 0
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Batches of samples, with their energy maps by the Gaussian of the other folds.

    Args:
        image_N: the image of each sample, from the sample `first` on.
    """
    shares = [(fold, share + first) for fold, share in fold_batches(image_N, len(gaussians))]
    for (fold, share), y in zip(shares, source.batches(0, [share for _, share in shares]), strict=True):
        yield share, gaussian_energies(gaussians[fold], y)


def _thumbnail(image: Mapping[str, Any], reader: ImageReader) -> bytes:
    """JPEG of an image, a row in the `INDEX` schema. Raises ImageError if it can no longer be read."""
    data = io.BytesIO()
    read_image(image, reader, THUMBNAIL_SIDE).save(data, "JPEG", quality=80)
    return data.getvalue()


def _manifest(ranking: pa.Table, trimmed: int) -> bytes:
    """CSV with the columns image_uri, score and trimmed (0 or 1)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_uri", "score", "trimmed"])
    pairs = zip(ranking["image_uri"].to_pylist(), ranking[SCORE].to_pylist(), strict=True)
    for number, (uri, score) in enumerate(pairs):
        writer.writerow([uri, f"{score:.4f}", int(number < trimmed)])
    return text.getvalue().encode()
