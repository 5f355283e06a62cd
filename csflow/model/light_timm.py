"""Imports timm without PyTorch's compiler, which takes as long to load as PyTorch itself.

timm and torchvision ask for the compiler as they are loaded: timm to decorate a function of networks that
take images of any shape, torchvision to know whether it could compile an operator on regions. csflow calls
neither. benchmarks/startup.py prints what that saves.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

UTILS = "torch._dynamo.utils"


def import_timm() -> ModuleType:
    """The package timm, which the first call loads."""
    with _without_compiler():
        import timm
    return timm


@contextmanager
def _without_compiler() -> Iterator[None]:
    if "timm" in sys.modules or "torch._dynamo" in sys.modules:
        yield
        return
    disable = torch.compiler.disable
    sys.modules[UTILS] = stand_in = _Utils(UTILS)
    torch.compiler.disable = _undecorated  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(UTILS) is stand_in:
            del sys.modules[UTILS]


class _Utils(ModuleType):
    """Stands in for the compiler's module that torchvision asks."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        """What another release of timm or torchvision asks for, from the compiler after all."""
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(UTILS) is self:
            del sys.modules[UTILS]
        return getattr(importlib.import_module(UTILS), name)


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if function is not None else _undecorated
