"""The model card: a README for a model directory, with plots of loss curves and calibration scores."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import csflow
from csflow.calibration import lowest_rate
from csflow.charts import Curve, chart, steps
from csflow.config import FALSE_POSITIVE_RATE, FALSE_REGIONS
from csflow.model_directory import Calibration
from csflow.training.labelled import auroc_line

BINS = 40

CARD = """\
# {backbone}, {blocks} coupling block{plural}, {height} × {width} px

A CS-Flow defect detector trained by csflow {csflow_version} on images of good parts. Score images with
it: `csflow score --model <this folder> --input <images> --output <folder>`.
{warnings}
![Loss per epoch](curves.svg)

| | |
|---|---|
| training images | {training_images} |
| training images left out by `--trim` | {trimmed_images} |
| validation images (choose the epoch) | {validation_images} |
| held-out images (calibration) | {heldout_images}{in_turn} |
| unreadable images left out | {unreadable_images} |
| copies of other images left out | {copies} |
| fingerprint of the images | `{fingerprint}` |
| epochs, and the one kept | {epochs}, {best_epoch} |
| training loss of that epoch | {loss:.4f} |
| validation loss of that epoch | {validation_loss} |
| held-out loss | {heldout_loss:.4f} |
{baseline}{mask}
The loss is (½‖z‖² − log|det J|) / dim(z) per image{last_layer}. The epoch
with the lowest validation loss is kept; without validation images it is the last one. {no_label}

## Scores

{scores}

## Calibration

![Anomaly scores of the held-out images](calibration.svg)

| | |
|---|---|
{calibration}
P-values compare an image's score with those of the held-out images in `calibration.parquet`{held_out}.

## Training images least like the others

A defect among the training images is learned as usual. These {outlier_count} are the least likely, each by a
Gaussian of three quarters of the training images that it is not among; a score of 1 is usual. Look at them:
odd but good ones should stay. The next training leaves the others out with `--exclude outliers.csv`, once the
good ones are deleted from that file. `--trim 0.01` leaves out the first hundredth without asking.

{outliers}

## Settings

```json
{settings}
```
"""

STANDARDISED_SCORES = """\
The anomaly map tells, place by place, how unusual the backbone's features are to a Gaussian of each position,
as a multiple of what is usual there; the scores read the flow's latents, too. 1 is usual. The *global score*
is the mean over all places: is the whole image unusual? The *local score* is the mean over the most unusual
0.5 % of them: is there an unusual place? The anomaly score is their weighted sum, in which the local one
counts most. No cell of a normal image's map exceeds the map threshold, except in the stated share of them."""

LAST_LAYER = """; those of an epoch are without the last layer, which
whitens the latents of each position when the epochs are done, the held-out loss is with it"""

PLAIN_SCORES = """\
The anomaly score is the mean of z²/2 over all entries of the latents; the global score is the same, and there
is no local score. The anomaly map is the mean of z² at each place of the largest scale. A model
without whitening of its features, as the paper's recipe makes it, has no map threshold."""

HELD_OUT = """, which took part
neither in training nor in the choice of the epoch"""
HELD_OUT_IN_TURN = """. All images
were trained on. The score of each in that file is by that of {folds} further trainings which left out the
image, and a part of the others (cross-calibration)"""

MASK = "| pixels that the model looks at, white in [mask.png](mask.png) | {share:.0%} |\n"

NO_LABEL_SEEN = "No label of a defect was ever seen."
NO_LABEL_USED = "Labelled images were scored at the end and decided nothing."


def model_card(
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    calibration: Calibration,
    outliers: Sequence[Mapping[str, Any]],
    mask_HW: NDArray[np.bool_] | None = None,
) -> dict[str, bytes]:
    """The files of the card, by name.

    Args:
        data: counts of images and their fingerprint.
        metrics: `history` (the loss curves), `best_epoch`, `heldout_loss`, `validation_loss`,
            `gaussian_loss`, `warnings` and `evaluation`.
        outliers: as from `outlier_files`.
        mask_HW: the pixels that the model looks at; None if it looks at all.
    """
    is_whitened = metrics["gaussian_loss"] is not None
    history, best_epoch = metrics["history"], metrics["best_epoch"]
    best = history[best_epoch - 1]
    validation_loss = best["validation_loss"]
    folds = data["calibration_folds"]
    text = CARD.format(
        **data,
        backbone=settings["backbone"],
        blocks=settings["coupling_blocks"],
        plural="" if settings["coupling_blocks"] == 1 else "s",
        height=settings["image_size"][0],
        width=settings["image_size"][-1],
        csflow_version=csflow.__version__,
        epochs=len(history),
        best_epoch=best_epoch,
        loss=best["loss"],
        validation_loss="none" if validation_loss is None else f"{validation_loss:.4f}",
        heldout_loss=metrics["heldout_loss"],
        baseline=_baseline(metrics),
        mask="" if mask_HW is None else MASK.format(share=mask_HW.mean()),
        last_layer=LAST_LAYER if is_whitened else "",
        no_label=NO_LABEL_USED if metrics["evaluation"] else NO_LABEL_SEEN,
        in_turn=f", each in turn from one of {folds} further trainings" if folds else "",
        held_out=HELD_OUT_IN_TURN.format(folds=folds) if folds else HELD_OUT,
        warnings="".join(f"\n> {line}\n" for line in metrics["warnings"]),
        scores=STANDARDISED_SCORES if is_whitened else PLAIN_SCORES,
        calibration=calibration_rows(calibration),
        outlier_count=len(outliers),
        outliers=_outlier_table(outliers),
        settings=json.dumps(settings, indent=2),
    )
    files = {
        "README.md": text.encode(),
        "curves.svg": curves_svg(history, best_epoch),
        "calibration.svg": histogram_svg(calibration.anomaly_score),
    }
    return files if mask_HW is None else files | {"mask.png": _png(mask_HW)}


def _png(mask_HW: NDArray[np.bool_]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask_HW).save(file, "PNG")
    return file.getvalue()


def _baseline(metrics: Mapping[str, Any]) -> str:
    """Rows on the Gaussian that the flow has to beat, and on labelled images; empty without such figures."""
    rows = []
    if metrics["gaussian_loss"] is not None and metrics["validation_loss"] is not None:
        kind = "held-out" if metrics["history"][0]["validation_loss"] is None else "validation"
        rows.append(f"| {kind} loss, latents whitened | {metrics['validation_loss']:.4f} |")
        rows.append(f"| {kind} loss of the Gaussian of each position | {metrics['gaussian_loss']:.4f} |")
    evaluation = metrics["evaluation"]
    if evaluation and "flow_auroc" in evaluation:
        line = auroc_line(evaluation["flow_auroc"], evaluation["gaussian_auroc"], evaluation["images"])
        rows.append(f"| AUROC | {line.removeprefix('AUROC: ')} |")
    return "".join(f"{row}\n" for row in rows)


def calibration_rows(calibration: Calibration) -> str:
    """Table rows on the scores of normal images."""
    scores = {"anomaly": calibration.anomaly_score}
    if calibration.global_score is not None and calibration.local_score is not None:
        scores |= {"global": calibration.global_score, "local": calibration.local_score}
    rows = [
        f"| held-out {name} score, median and 95 % "
        f"| {np.median(values):.4f}, {np.quantile(values, 0.95):.4f} |"
        for name, values in scores.items()
    ]
    if calibration.map_maximum is not None:
        of_map = calibration.map_threshold(FALSE_POSITIVE_RATE)
        rows.append(
            f"| map threshold at a false-positive rate of {FALSE_POSITIVE_RATE:g} | {_shown(of_map)} |"
        )
        of_regions = calibration.region_threshold(FALSE_REGIONS)
        rows.append(
            f"| region threshold: at most {FALSE_REGIONS:g} regions expected on a normal image "
            f"| {_shown(of_regions)} |"
        )
    if calibration.weights is not None:
        rows.append(f"| parts that they show, which count as one each | {calibration.size} |")
    for group, own in calibration.groups.items():
        rows.append(f"| {group}, compared with its own held-out {own.unit} | {own.size} |")
    rows.append(f"| smallest possible p-value | {lowest_rate(calibration.size):g} |")
    return "".join(f"{row}\n" for row in rows)


def _shown(threshold: float | None) -> str:
    return "too few held-out images to tell" if threshold is None else f"{threshold:.4f}"


def _outlier_table(outliers: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in outliers:
        # As HTML: no character of a URI ends a cell or the code.
        uri = html.escape(row["image_uri"]).replace("|", "&#124;")
        picture = f"![]({row['thumbnail']})" if row["thumbnail"] else "can no longer be read"
        trimmed = " (left out by `--trim`)" if row["trimmed"] else ""
        rows.append(f"| {picture} | {row['score']:.3f}{trimmed} | <code>{uri}</code> |")
    return "\n".join(["| image | score | URI |", "|---|---|---|", *rows])


def curves_svg(history: Sequence[Mapping[str, Any]], best_epoch: int) -> bytes:
    """Plots training and validation loss against epochs, with the kept epoch marked."""
    named = {"training loss": "loss", "validation loss": "validation_loss"}
    losses = {name: [line[key] for line in history] for name, key in named.items()}
    losses = {name: values for name, values in losses.items() if None not in values}
    curves = [Curve(name, range(1, len(history) + 1), values) for name, values in losses.items()]
    span = [min(map(min, losses.values())), max(map(max, losses.values()))]
    kept = Curve("epoch that is kept", [best_epoch, best_epoch], span)
    return chart([*curves, kept], "epoch", "loss")


def histogram_svg(scores: NDArray[np.float64]) -> bytes:
    """Plots how many held-out images have which anomaly score."""
    counts, edges = np.histogram(scores, bins=BINS)
    outline = Curve(f"held-out images ({len(scores)})", *steps(counts, edges), is_filled=True)
    return chart([outline], "anomaly score", "images", y_range=(0, max(counts.max(), 1)))
