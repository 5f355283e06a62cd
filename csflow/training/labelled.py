"""Labelled images that measure a trained model (`--evaluate`), and take no other part in the training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from csflow.cluster import run_task, share_out
from csflow.errors import Failed, WrongUse
from csflow.evaluation import image_metrics
from csflow.evaluation.labels import Label, read_labels
from csflow.heldout import score_heldout
from csflow.inputs.listing import list_table
from csflow.inputs.selection import Selection
from csflow.model import Detector
from csflow.precision import Device
from csflow.storage import Location
from csflow.training.cache import FeatureCache, find_images
from csflow.training.config import TrainConfig
from csflow.training.gaussians import gaussian_energies, gaussian_scores, gaussian_statistic
from csflow.training.sources import open_features
from csflow.training.split import TrainingData

BATCH_SIZE = 32


class Measured(NamedTuple):
    """AUROC of the detector and of the Gaussian on the same images."""

    flow: float
    gaussian: float | None
    """AUROC of the Gaussian of each position alone; None without whitening, and with tiles."""


@dataclass(frozen=True)
class LabelledImages:
    """The images that `--evaluate` names."""

    table: str
    labels: dict[str, Label]
    """Labels by image URI."""
    listed: pa.Table
    """Labelled images that are not in the input, in the `LISTING` schema."""
    in_input: int
    """Labelled images that are in the input."""
    unlabelled: int
    """Images that the table lists without their own label, such as members of an archive."""

    @classmethod
    def read(cls, config: TrainConfig, images: pa.Table) -> "LabelledImages | None":
        """Reads `--evaluate`; None if it is not given.

        Args:
            images: the input, in the `LISTING` schema.

        Raises:
            WrongUse: the table is wrong, or has labels of one kind only.
        """
        if config.evaluate is None:
            return None
        location = Location(config.evaluate, config.storage_options)
        labels = read_labels(location, "--evaluate")
        if len({label.is_defective for label in labels.values()}) < 2:
            found = f"its {len(labels)} have one label; add others" if labels else "it has no rows; add them"
            raise WrongUse(f"--evaluate {location} needs images of label 0 and of label 1, and {found}")
        selection = Selection(allow_schemes=config.allow_schemes)
        listed = list_table([config.evaluate], config.storage_options, selection)
        labelled = listed.filter(pc.field("image_uri").isin(pa.array(labels, pa.string())))
        own = labelled.filter(~pc.field("image_uri").isin(images["image_uri"].combine_chunks()))
        return cls(
            table=config.evaluate,
            labels=labels,
            listed=own,
            in_input=labelled.num_rows - own.num_rows,
            unlabelled=listed.num_rows - labelled.num_rows,
        )

    def measure(
        self,
        detector: Detector,
        cache: FeatureCache,
        cached: pa.Table,
        data: TrainingData,
        device: Device,
    ) -> dict[str, Any]:
        """Measures the detector on the images; prints the AUROC and returns it for metrics.json.

        Args:
            cached: rows of these images and of the input, in the `INDEX` schema.
        """
        found = find_images(self.listed, cached)[0]
        readable = found.filter(pc.is_valid(pc.field("content_digest")))
        own = readable.filter(~pc.field("content_digest").isin(data.split["content_digest"].combine_chunks()))
        is_defective_N = np.array(
            [self.labels[uri].is_defective for uri in own["image_uri"].to_pylist()], bool
        )
        counts = {
            "images": own.num_rows,
            "defective": int(is_defective_N.sum()),
            "in_input": self.in_input + readable.num_rows - own.num_rows,
            "unreadable": len(self.labels) - self.in_input - readable.num_rows,
            "unlabelled": self.unlabelled,
        }
        print(_summary(counts))
        if is_defective_N.all() or not is_defective_N.any():
            print(f"warning: --evaluate {self.table}: images of both labels are needed, and one is left")
            return {"labels": self.table} | counts
        auroc = _measured(detector, cache, data, own, is_defective_N.tolist(), device)
        print(auroc_line(auroc.flow, auroc.gaussian, own.num_rows))
        return {"labels": self.table, **counts, "flow_auroc": auroc.flow, "gaussian_auroc": auroc.gaussian}


def auroc_line(flow: float, gaussian: float | None, images: int) -> str:
    """The line on AUROC for terminal and model card."""
    alone = f", Gaussian {gaussian:.3f}" if gaussian is not None else ""
    return f"AUROC: flow {flow:.3f}{alone} on {images:,} labelled images"


def _summary(counts: dict[str, int]) -> str:
    said = {
        "in_input": "are in the input as well and left out",
        "unreadable": "cannot be read",
        "unlabelled": "have no label of their own",
    }
    parts = [f"{counts[name]:,} {text}" for name, text in said.items() if counts[name]]
    return "; ".join([f"{counts['images']:,} labelled images to evaluate on", *parts])


def _measured(
    detector: Detector,
    cache: FeatureCache,
    data: TrainingData,
    images: pa.Table,
    labels: Sequence[bool],
    device: Device,
) -> Measured:
    # As at the end of training: without validation images training ones must tell what is usual.
    usual = data.subset("validation") if data.subset("validation").num_rows else data.subset("training")
    resources = share_out(1, device=device)
    if detector.architecture.tiling:
        scored, failed = run_task(
            score_heldout,
            *(detector, images, cache.folder.storage_options, cache.limits),
            resources=resources,
        )
        for image in failed:
            raise Failed(f"image {image.image_uri} of --evaluate can no longer be read ({image.content})")
        return Measured(image_metrics(labels, scored["anomaly_score"].to_pylist())["image_auroc"], None)
    flow_scores, gaussian_scores = run_task(_scores, detector, cache, usual, images, resources=resources)
    return Measured(
        image_metrics(labels, flow_scores)["image_auroc"],
        image_metrics(labels, gaussian_scores)["image_auroc"] if gaussian_scores else None,
    )


@torch.no_grad()
def _scores(
    device: torch.device, detector: Detector, cache: FeatureCache, usual: pa.Table, images: pa.Table
) -> tuple[list[float], list[float]]:
    """Anomaly scores of each image by the detector, and by its Gaussian alone (None without whitening)."""
    detector = detector.to(device)
    gaussians = detector.gaussians

    def batches(some: pa.Table) -> Iterator[list[Tensor]]:
        source = open_features(cache, some, memory_bytes=0, device=device)
        return source.batches(0, torch.arange(len(source)).split(BATCH_SIZE))

    of_flow = [
        score for y in batches(images) for score in detector.score_features(y).anomaly_score_B.tolist()
    ]
    if gaussians is None:
        return of_flow, []
    maps = zip(*(gaussian_energies(gaussians, y) for y in batches(usual)), strict=True)
    statistic = gaussian_statistic([torch.cat(parts) for parts in maps], cache.feature_shapes)
    of_gaussian = [
        score
        for y in batches(images)
        for score in gaussian_scores(statistic, gaussian_energies(gaussians, y)).tolist()
    ]
    return of_flow, of_gaussian
