"""What every run must come to: the images one by one through the detector, without shards or a cluster."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from csflow.errors import ErrorCode, ImageError
from csflow.images import decode
from csflow.model.whitening import one_thread
from csflow.model_directory import load_model
from csflow.storage import Location

SCORE_TOLERANCE = 1e-2
"""Relative: what the job's precision may change."""


class PlainLoop:
    """Scores bytes; remembers what it has scored, since many tests use the same photographs."""

    def __init__(self, model: Path | Location) -> None:
        location = Location(str(model)) if isinstance(model, Path) else model
        self._detector = load_model(location).detector
        self._outcomes: dict[bytes, float | ErrorCode] = {}

    def outcome(self, data: bytes) -> float | ErrorCode:
        """Anomaly score of an image, or why it has none."""
        key = hashlib.sha256(data).digest()
        if key not in self._outcomes:
            self._outcomes[key] = self._score(data)
        return self._outcomes[key]

    @torch.inference_mode()
    @one_thread()
    def _score(self, data: bytes) -> float | ErrorCode:
        try:
            pixels_HWC = decode(data, self._detector.architecture.preprocessing).pixels_HWC
        except ImageError as error:
            return error.code
        return float(self._detector(torch.from_numpy(pixels_HWC)[None]).anomaly_score_B.item())

    def assert_same(self, scores: pd.DataFrame, images: Mapping[str, bytes]) -> None:
        """Each image of `images` (by URI) that has a score is in `scores` once, with this score."""
        expected = {uri: self.outcome(data) for uri, data in images.items()}
        expected = {uri: score for uri, score in expected.items() if not isinstance(score, ErrorCode)}
        assert Counter(scores.image_uri) == Counter(list(expected))
        np.testing.assert_allclose(
            scores.anomaly_score, [expected[uri] for uri in scores.image_uri], rtol=SCORE_TOLERANCE
        )


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their URIs."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
