"""Shows a training while it runs: lines in the terminal, and curves in TensorBoard and MLflow."""

import importlib.util
import math
from typing import Any

from csflow.console import Progress, say
from csflow.storage import Location
from csflow.training.config import TrainConfig
from csflow.training.split import FOLDS

CURVES = ("loss", "validation_loss", "grad_norm", "images_per_second")


class LiveView:
    """Shows each finished epoch."""

    def __init__(self, config: TrainConfig, epochs: int, tensorboard: Location, is_cross: bool) -> None:
        self._epochs = epochs
        # As many images as are shown after the last epoch, in trainings without a fold each.
        self._further_epochs = epochs * (FOLDS - 1) if is_cross else 0
        self._progress = Progress(epochs, "epochs", line_seconds=math.inf)
        self._tensorboard = _open_tensorboard(tensorboard)
        self._mlflow = _open_mlflow(config)

    def show(self, line: dict[str, Any]) -> None:
        """Args: line: an `Epoch` as a dictionary, or `fold` and `seconds` of a training that left it out."""
        if "fold" in line:
            left = line["seconds"] * (FOLDS - line["fold"])
            say(f"held out fold {line['fold']}/{FOLDS}  {line['seconds']:.0f} s  {left:.0f} s left")
            return
        left = line["seconds"] * (self._epochs - line["epoch"] + self._further_epochs)
        validation = line["validation_loss"]
        say(
            f"epoch {line['epoch']}/{self._epochs}  loss {line['loss']:.4f}  "
            + (f"validation {validation:.4f}  " if validation is not None else "")
            + f"{line['images_per_second']:.0f} images/s  at most {left:.0f} s of training left"
        )
        self._progress.update(line["epoch"], f"{line['images_per_second']:.0f} images/s", left)
        curves = {name: line[name] for name in CURVES if line[name] is not None}
        if self._tensorboard is not None:
            for name, value in curves.items():
                self._tensorboard.add_scalar(name, value, line["epoch"])
            self._tensorboard.flush()
        if self._mlflow is not None:
            self._mlflow.log_metrics(curves, step=line["epoch"])

    def close(self) -> None:
        self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._mlflow is not None:
            self._mlflow.end_run()


def _open_tensorboard(folder: Location) -> Any:
    """A writer of event files; None for object stores, which cannot append to files."""
    if not folder.is_local:
        return None
    # Ray Train brings this writer along; it needs no TensorFlow and no TensorBoard.
    from tensorboardX import SummaryWriter

    return SummaryWriter(folder.path)


def _open_mlflow(config: TrainConfig) -> Any:
    """MLflow's module after starting a run, if MLflow is installed; the MLFLOW_* variables set the server."""
    if importlib.util.find_spec("mlflow") is None:
        return None
    import mlflow

    mlflow.start_run()
    mlflow.log_params(config.model_dump(mode="json", exclude={"storage_options"}))
    return mlflow
