"""INT8: NNCF quantises as many of a model's convolutions as the user's labelled images allow.

Rounding moves features, and a flow takes moved features for anomalies. So what INT8 loses is measured on
labelled images, and what loses too much is not written. A convolution's rounding passes through all that
follow, so that those of the backbone harm most, and quantised are the deepest ones, as many as can be: first
those of the flow. The held-out images are scored anew, in INT8, so that p-values compare like with like.

Dimension letters: N labelled images, B batch, H height, W width.
"""

import hashlib
import io
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from numpy.typing import NDArray

from csflow.errors import ImageError, WrongUse
from csflow.evaluation.labels import Label
from csflow.evaluation.ranking import Ranking, auroc_loss
from csflow.heldout import score_images
from csflow.images import DecodedImage, decode
from csflow.library.sources import Source, open_store
from csflow.model import Architecture, Scores
from csflow.model_directory import Calibration
from csflow.preprocessing import Preprocessing

MOST_LABELLED = 200
"""Number of images of each class that are drawn, if there are more."""
FEWEST_LABELLED = 10
"""Of each class."""
RESAMPLES = 1000
"""Number of bootstrap resamples for the interval of the loss."""
ROUNDING = 1e-9
"""Of a difference of two AUROCs, so that a loss of exactly what is allowed is allowed."""
CONVOLUTIONS = frozenset(["Convolution", "GroupConvolution"])
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
"""What is not quantised is computed in float32, as by the runtime."""
TOLERANCE = 0.02
"""Largest relative difference of a score from that of the exporting machine. Processors add in another order,
and a sum at the border of two integers then becomes the other one."""


@dataclass(frozen=True)
class Labelled:
    """Labelled images of a model's size, the classes mixed."""

    image_N1HWC: Sequence[NDArray[np.uint8]]
    is_defective_N: Sequence[bool]

    @classmethod
    def read(
        cls, labels: Mapping[str, Label], storage_options: Mapping[str, Any], preprocessing: Preprocessing
    ) -> "Labelled":
        """Draws images of both classes and reads them. Raises WrongUse if too few can be read."""
        drawn, store = random.Random(0), open_store(storage_options)
        chosen = []
        for is_defective in (False, True):
            uris = sorted(uri for uri, label in labels.items() if label.is_defective == is_defective)
            chosen += drawn.sample(uris, min(len(uris), MOST_LABELLED))
        drawn.shuffle(chosen)
        images, is_defective_N = [], []
        for uri in chosen:
            try:
                images.append(decode(Source(uri, store).read(), preprocessing).pixels_HWC[None])
            except ImageError:
                continue
            is_defective_N.append(labels[uri].is_defective)
        for is_defective, name in ((False, "normal"), (True, "defective")):
            if (count := is_defective_N.count(is_defective)) < FEWEST_LABELLED:
                raise WrongUse(
                    f"--labels: {count} {name} images can be read, and it takes {FEWEST_LABELLED} to measure "
                    "what INT8 loses; label more"
                )
        return cls(images, is_defective_N)

    @property
    def normal(self) -> list[NDArray[np.uint8]]:
        items = zip(self.image_N1HWC, self.is_defective_N, strict=True)
        return [image_1HWC for image_1HWC, is_defective in items if not is_defective]

    def scores(self, network: openvino.Model) -> list[float]:
        """Anomaly scores (N,) by the network."""
        request = compiled(network)
        return [float(request.infer([image])["anomaly_score"][0]) for image in self.image_N1HWC]

    def auroc(self, scores: Sequence[float]) -> float:
        return Ranking.of(self.is_defective_N, scores).metrics()["image_auroc"]


@dataclass(frozen=True)
class Loss:
    """What INT8 costs on labelled images."""

    labelled_images: int
    float32_image_auroc: float
    image_auroc: float
    interval: tuple[float, float]
    """95 % interval of the loss of AUROC, over resamples of the images."""
    convolutions: int
    quantised: int

    @property
    def of_auroc(self) -> float:
        return self.float32_image_auroc - self.image_auroc

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"AUROC {self.image_auroc:.4f} on {self.labelled_images} labelled images, "
            f"{self.float32_image_auroc:.4f} in float32 (loss {self.of_auroc:.4f}, 95 % interval {low:.4f} "
            f"to {high:.4f}), with {self.quantised} of {self.convolutions} convolutions in INT8"
        )


def quantised(
    network: openvino.Model, labelled: Labelled, max_loss: float, tell: Callable[[Loss], None]
) -> tuple[openvino.Model, Loss]:
    """A network in INT8 that loses at most `max_loss` of AUROC, and what it loses.

    The number of convolutions that can be quantised is found by halving. NNCF's own search, which returns
    convolutions to float32 one by one, compiles a network for each.

    Args:
        tell: is given what each network loses that is tried.

    Raises:
        WrongUse: every such network loses more.
    """
    nncf.set_log_level(logging.ERROR)
    convolutions = by_depth(network)
    if not convolutions:
        raise WrongUse("INT8 is for convolutions, and this model has none; export in float32")
    float32_N = labelled.scores(network)
    float32_auroc = labelled.auroc(float32_N)
    # The most convolutions that are known to lose little enough, and the fewest that lose too much.
    allowed, refused = 0, len(convolutions) + 1
    best: tuple[openvino.Model, Loss] | None = None
    last = len(convolutions)
    while refused - allowed > 1:
        found = _with_last(network, convolutions, last, labelled)
        score_N = labelled.scores(found)
        loss = Loss(
            len(score_N),
            float32_auroc,
            labelled.auroc(score_N),
            auroc_loss(labelled.is_defective_N, float32_N, score_N, RESAMPLES)[1],
            len(convolutions),
            last,
        )
        tell(loss)
        if loss.of_auroc <= max_loss + ROUNDING:
            allowed, best = last, (found, loss)
        else:
            refused = last
        last = (allowed + refused) // 2
    if best is None:
        raise WrongUse(
            f"INT8 loses more than --max_loss {max_loss:g} ({loss}); export in float32, or allow more"
        )
    return best


def by_depth(network: openvino.Model) -> list[str]:
    """The names of the convolutions, by the number of operators before them on the longest way."""
    depth: dict[str, int] = {}
    operators = network.get_ordered_ops()
    for operator in operators:
        before = [value.get_node().get_friendly_name() for value in operator.input_values()]
        depth[operator.get_friendly_name()] = 1 + max((depth[name] for name in before), default=0)
    names = [op.get_friendly_name() for op in operators if op.get_type_name() in CONVOLUTIONS]
    return sorted(names, key=depth.__getitem__)


def _with_last(
    network: openvino.Model, convolutions: Sequence[str], last: int, labelled: Labelled
) -> openvino.Model:
    """The network with the `last` of these convolutions in INT8, by their ranges on the normal images."""
    others = {operator.get_type_name() for operator in network.get_ops()} - CONVOLUTIONS
    normal = labelled.normal
    with redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            network,
            nncf.Dataset(normal),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(normal),
            ignored_scope=nncf.IgnoredScope(
                names=list(convolutions[: len(convolutions) - last]), types=sorted(others), validate=False
            ),
            # Processors without VNNI add pairs of products in 16 bits, which weights of 8 bits overflow: then
            # the same artefact scored an image at 0.9 on one processor and at 4.4 on another.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )


def calibrated(
    network: openvino.Model, old: Calibration, architecture: Architecture, storage_options: Mapping[str, Any]
) -> Calibration:
    """The held-out images with the network's scores. Raises WrongUse if some of them cannot be read."""
    request = compiled(network)
    names = [output.get_any_name() for output in network.outputs]
    nothing = torch.empty(0)

    def score(images: Sequence[DecodedImage]) -> Scores:
        found = request.infer([np.stack([image.pixels_HWC for image in images])])
        value = {name: torch.from_numpy(np.array(found[name])) for name in names}
        return Scores(
            value["anomaly_score"],
            value["global_score"],
            value.get("local_score", nothing),
            value["scale_scores"],
            value["anomaly_map"],
            nothing,
        )

    table, failed = score_images(score, architecture, old.table, storage_options)
    if failed:
        raise WrongUse(
            f"INT8 scores the held-out images anew, and {len(failed)} of {old.table.num_rows} cannot be read "
            f"({failed[0].image_uri}: {failed[0].content}); restore them, or name others with csflow "
            "recalibrate"
        )
    # Images come back in their order, so that their parts stay theirs.
    return Calibration.of(table.set_column(table.schema.get_field_index("part"), "part", old.table["part"]))


def joined(scoring: openvino.Model, judge: openvino.Model) -> openvino.Model:
    """One network from two, the second of which takes outputs of the first."""
    for parameter in judge.get_parameters():
        score = scoring.output(parameter.output(0).get_any_name()).get_node().input_value(0)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(score)
    return openvino.Model([*scoring.get_results(), *judge.get_results()], scoring.get_parameters())


def compiled(network: openvino.Model) -> openvino.InferRequest:
    """The network, ready to compute in this process, as the runtime does."""
    return openvino.compile_model(network, "CPU", SETTINGS).create_infer_request()


def model_id(of: str, network: openvino.Model) -> str:
    """The id of the artefact, whose scores are not those of model `of`: a hash of both."""
    digest = hashlib.sha256(of.encode())
    for operator in network.get_ops():
        if operator.get_type_name() == "Constant":
            digest.update(operator.get_data().tobytes())
    return digest.hexdigest()[:16]
