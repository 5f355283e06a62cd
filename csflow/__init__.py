"""csflow: train CS-Flow defect detectors and score whole image archives with them, on Ray.

    import csflow

    model = csflow.load("models/cells")
    result = model.score("part.png")

The names in `__all__` are the library. They are imported when they are first used, so that `import csflow`
costs nothing: no PyTorch, no Ray, no network.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from csflow.errors import ImageError, Incomplete, WrongUse
    from csflow.library.archive import ScoresTable, read_scores
    from csflow.library.model import Model, load
    from csflow.library.result import Region, Result
    from csflow.library.verbs import evaluate, export, score, train

_PLACES = {
    "ImageError": "csflow.errors",
    "Incomplete": "csflow.errors",
    "Model": "csflow.library.model",
    "Region": "csflow.library.result",
    "Result": "csflow.library.result",
    "ScoresTable": "csflow.library.archive",
    "WrongUse": "csflow.errors",
    "evaluate": "csflow.library.verbs",
    "export": "csflow.library.verbs",
    "load": "csflow.library.model",
    "read_scores": "csflow.library.archive",
    "score": "csflow.library.verbs",
    "train": "csflow.library.verbs",
}
"""The module of each public name."""

__all__ = [
    "ImageError",
    "Incomplete",
    "Model",
    "Region",
    "Result",
    "ScoresTable",
    "WrongUse",
    "__version__",
    "evaluate",
    "export",
    "load",
    "read_scores",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'csflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
