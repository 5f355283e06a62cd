"""Checkpoints of training: safetensors and JSON, not pickles."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from csflow.errors import DamagedFile, StorageFailed
from csflow.training.loop import Trainer

STATE_FILE = "state.safetensors"
PROGRESS_FILE = "progress.json"


@contextmanager
def written_checkpoint(trainer: Trainer, closing: Mapping[str, Tensor]) -> Iterator[str]:
    """A temporary folder with all that a trainer needs to continue. `closing`: results of a finished one."""
    with tempfile.TemporaryDirectory() as folder:
        state = {f"flow.{k}": v.contiguous() for k, v in trainer.plain_flow.state_dict().items()}
        state |= {f"best.{k}": v.contiguous() for k, v in trainer.best_state.items()}
        state |= _flatten_optimizer(trainer.optimizer.state_dict())
        state |= {f"closing.{k}": v.contiguous() for k, v in closing.items()}
        safetensors.torch.save_file(state, Path(folder) / STATE_FILE)
        progress = {"history": trainer.history, "best_epoch": trainer.best_epoch}
        (Path(folder) / PROGRESS_FILE).write_text(json.dumps(progress))
        yield folder


def read_checkpoint(folder: str, location: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and progress of a checkpoint. `location` says where `folder` was copied from, if it was.

    Tensors' names begin with `flow.`, `best.` (the weights of the epoch to keep) or `optimizer.`; a finished
    training also has `closing.`. Progress holds `history` (the loss curves) and `best_epoch`.

    Raises:
        DamagedFile: a file is damaged or missing.
        StorageFailed: a file cannot be read.
    """
    with _naming_damage(location or folder):
        tensors = safetensors.torch.load_file(Path(folder) / STATE_FILE)
        progress = json.loads((Path(folder) / PROGRESS_FILE).read_text())
        return tensors, {"history": progress["history"], "best_epoch": progress["best_epoch"]}


def restore(trainer: Trainer, folder: str) -> bool:
    """Continues from a checkpoint; returns whether the training had finished.

    Raises:
        DamagedFile: a file is damaged.
    """
    tensors, progress = read_checkpoint(folder)
    with _naming_damage(folder):
        return _restore(trainer, tensors, progress)


@contextmanager
def _naming_damage(folder: str) -> Iterator[None]:
    """Turns whatever a damaged checkpoint raises into one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise damaged(f"the checkpoint {folder}", error) from None
        # It may be whole, and must not be given up.
        raise StorageFailed(
            f"the checkpoint {folder} cannot be read ({error}); the same command continues"
        ) from error
    except Exception as error:
        raise damaged(f"the checkpoint {folder}", error) from None


def damaged(what: str, error: Exception) -> DamagedFile:
    """The error that says in one line what is damaged, from that of a reader."""
    reason = " ".join(str(error).split())[:200]
    return DamagedFile(
        f"{what} is damaged ({type(error).__name__}: {reason})",
        "run the same command without --resume, which trains from the beginning",
    )


def _restore(trainer: Trainer, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> bool:
    trainer.history, trainer.best_epoch = progress["history"], progress["best_epoch"]
    trainer.plain_flow.load_state_dict(with_prefix(tensors, "flow."))
    trainer.best_state = {k: v.to(trainer.worker.device) for k, v in with_prefix(tensors, "best.").items()}
    fresh = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict(_unflatten_optimizer(fresh, with_prefix(tensors, "optimizer.")))
    for parameter, state in trainer.optimizer.state.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            # In the layout of the weights, which files do not have.
            state[moment] = torch.empty_like(parameter).copy_(state[moment])
    return bool(with_prefix(tensors, "closing."))


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have this prefix, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _flatten_optimizer(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"optimizer.{index}.{name}": value.contiguous()
        for index, values in state_dict["state"].items()
        for name, value in values.items()
    }


def _unflatten_optimizer(fresh: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": fresh["param_groups"]}
