"""The end of a training: statistic and calibration of the trained detector, and the Gaussian to beat."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from csflow.model import Gaussians, PlainStatistic, Scores, fitted_statistic
from csflow.model_directory import CALIBRATION
from csflow.regions import region_levels
from csflow.training.cross import Fold
from csflow.training.gaussians import gaussian_losses
from csflow.training.loop import Evaluation

CALIBRATED = ("anomaly_score", "global_score", "local_score", "map_maximum", "region_levels")
"""Columns of a calibration. Without whitening there is only the first."""
REGION_LEVELS = 16
"""Largest number of regions that a held-out image counts with. Thresholds that leave more are of no use."""


def closing_tensors(
    usual: Evaluation,
    heldout: Evaluation,
    gaussians: Gaussians | None,
    feature_shapes: Sequence[Sequence[int]],
    tile_counts: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The results of a finished training besides the flow, by name.

    `state.…` is the detector's state, and `calibration.…` are columns over the held-out images.
    `heldout_loss` and `usual_loss` are mean losses of held-out and of usual images; `gaussian_loss` would be
    that of usual images if the Gaussian of each position were the whole model.

    Args:
        usual: images that define what is usual, none of them held out.
        tile_counts: the number of tiles of each usual image, if the model sees tiles. Then there are no
            columns of the calibration, for which held-out images are scored as a whole (`csflow.heldout`).
    """
    statistic = (
        fitted_statistic(usual.energies, feature_shapes, tile_counts)
        if gaussians
        else PlainStatistic(feature_shapes)
    )
    closing = _state(statistic, gaussians)
    if tile_counts is None:
        columns = calibration_columns(statistic(heldout.energies))
        calibrated = CALIBRATED if gaussians else CALIBRATED[:1]
        closing |= {f"calibration.{name}": columns[name] for name in calibrated}
    closing["heldout_loss"] = heldout.losses_N.double().mean()
    closing["usual_loss"] = usual.losses_N.double().mean()
    if gaussians:
        closing["gaussian_loss"] = gaussian_losses(usual.energies[: len(feature_shapes)], gaussians).mean()
    return closing


def cross_closing_tensors(
    folds: Sequence[Fold], gaussians: Gaussians, feature_shapes: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """What `closing_tensors` returns, for a training whose images were held out in turn.

    The energies of all folds define what is usual to the model. A fold's own scores take as usual what the
    other folds' energies are: else each image would be a little usual because of itself.

    Args:
        folds: of trainings without them.
        gaussians: those of the model itself.
    """
    energies = [fold.evaluation.energies for fold in folds]
    places = [fold.places for fold in folds]
    columns = []
    for k, left_out in enumerate(energies):
        usual = in_order(energies[:k] + energies[k + 1 :], places[:k] + places[k + 1 :])
        columns.append(calibration_columns(fitted_statistic(usual, feature_shapes)(left_out)))
    closing = _state(fitted_statistic(in_order(energies, places), feature_shapes), gaussians)
    values = in_order([list(of_fold.values()) for of_fold in columns], places)
    closing |= {f"calibration.{name}": value for name, value in zip(CALIBRATED, values, strict=True)}
    closing["heldout_loss"] = torch.cat([fold.evaluation.losses_N for fold in folds]).double().mean()
    closing["usual_loss"] = closing["heldout_loss"].clone()
    closing["gaussian_loss"] = torch.cat([fold.gaussian_losses_N for fold in folds]).mean()
    return closing


def in_order(folds: Sequence[Sequence[Tensor]], places: Sequence[NDArray[np.int64]]) -> list[Tensor]:
    """Each tensor (N, …) over the images of all folds, given those of each, in the order of their places."""
    order_N = torch.from_numpy(np.argsort(np.concatenate(places)))
    return [torch.cat(of_folds)[order_N] for of_folds in zip(*folds, strict=True)]


def _state(statistic: nn.Module, gaussians: Gaussians | None) -> dict[str, Tensor]:
    modules: dict[str, nn.Module] = {"statistic": statistic}
    if gaussians:
        modules["gaussians"] = gaussians
    return {
        f"state.{module}.{name}": value.cpu()
        for module, part in modules.items()
        for name, value in part.state_dict().items()
    }


def calibration_columns(scores: Scores) -> dict[str, Tensor]:
    """The `CALIBRATED` columns of these images, (N,) each; levels of regions (N, `REGION_LEVELS`)."""
    maps_BHW = scores.anomaly_map_BHW.float().cpu().numpy()
    columns = [
        scores.anomaly_score_B,
        scores.global_score_B,
        scores.local_score_B,
        scores.anomaly_map_BHW.flatten(1).max(1).values,
        torch.from_numpy(np.stack([region_levels(map_HW, REGION_LEVELS) for map_HW in maps_BHW])),
    ]
    return {name: column_B.double() for name, column_B in zip(CALIBRATED, columns, strict=True)}


def calibration_table(columns: Mapping[str, Tensor]) -> pa.Table:
    """The columns as `CALIBRATION` has them, without the images."""
    arrays = {
        name: pa.array(
            column.tolist() if column.ndim == 1 else [row[row.isfinite()].tolist() for row in column],
            CALIBRATION.field(name).type,
        )
        for name, column in columns.items()
    }
    return pa.table(arrays)
