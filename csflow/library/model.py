"""A trained model in this process: scores images as the scoring job does, without a cluster."""

import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeAlias, cast, overload

import numpy as np
import torch
from PIL import Image

from csflow.calibration import lowest_rate, why_none_is_flagged
from csflow.config import FALSE_POSITIVE_RATE, FALSE_REGIONS
from csflow.errors import ImageError, WrongUse
from csflow.forms import Forms
from csflow.images import DecodedImage, decode
from csflow.inputs.loading import batches
from csflow.library.result import Region, Result
from csflow.library.sources import ImageLike, Source, open_store
from csflow.model import InferenceDetector, Scores, TiledDetector, default_batch_size
from csflow.model_directory import read_model
from csflow.precision import Device, PrecisionSetting
from csflow.scoring.rows import Judged, RegionRule, judge, peak, region_lists, require_scores
from csflow.storage import Location

READ_THREADS = 8
READ_AHEAD = 4
"""Number of batches that are read and decoded ahead of the model."""

Loaded: TypeAlias = tuple[Source, DecodedImage | ImageError]


def load(
    address: str | os.PathLike[str],
    *,
    false_positive_rate: float = FALSE_POSITIVE_RATE,
    false_regions: float = FALSE_REGIONS,
    device: Device = "auto",
    precision: PrecisionSetting = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> "Model":
    """Loads a model directory, to score images in this process.

    Args:
        address: path or URL of the model directory.
        false_positive_rate: share of normal images that may be flagged.
        false_regions: number of regions that a normal image may have on average.
        device: `auto` is a GPU if PyTorch has one.
        precision: as `--precision` of the scoring job, whose scores these are.
        storage_options: of the object stores of the model and of images.

    Raises:
        WrongUse: there is no model at this address, it is damaged, or a setting is out of range.
    """
    location = Location(os.fspath(address), storage_options or {})
    return Model(location, false_positive_rate, false_regions, device, precision)


class Model:
    """A loaded model. `csflow.load` makes one. Threads may share it; one of them computes at a time."""

    def __init__(
        self,
        location: Location,
        false_positive_rate: float,
        false_regions: float,
        device: Device,
        precision: PrecisionSetting,
    ) -> None:
        if not 0 < false_positive_rate < 1:
            raise WrongUse(f"false_positive_rate {false_positive_rate} must be between 0 and 1")
        if not 0 < false_regions <= 1:
            raise WrongUse(f"false_regions {false_regions} must be above 0 and at most 1")
        directory = read_model(location)
        self.address = str(location)
        self.model_id = directory.model_id
        self.false_positive_rate = false_positive_rate
        self.preprocessing = directory.preprocessing
        """Size, fit and filter with which images become the model's pixels."""
        self._calibration = directory.calibration
        self.map_threshold = directory.calibration.map_threshold(false_positive_rate)
        """Value that map cells of normal images exceed no more often than the false-positive rate."""
        heldout, unit = directory.calibration.size, directory.calibration.unit
        if why := why_none_is_flagged(heldout, false_positive_rate, unit):
            remedy = f"{lowest_rate(heldout):g} can, or a model trained on more {unit}"
            warnings.warn(f"{why}; {remedy}", stacklevel=3)  # of who calls csflow.load
        self._region_rule = RegionRule.of(directory.calibration, false_regions)
        self._store = open_store(location.storage_options)
        self._device = _device(device)
        try:
            self._forms = Forms(directory, precision, self._device)
        except ValueError as error:
            raise WrongUse(f"precision {precision}: {error}") from None
        self._batch_size = default_batch_size(self.preprocessing.image_size, self._device)
        self._compiled: dict[int, InferenceDetector] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        height, width = self.preprocessing.image_size
        return (
            f"<csflow model {self.model_id} of {height} x {width} pixels, flags p ≤ "
            f"{self.false_positive_rate:g}, from {self.address}>"
        )

    @overload
    def score(self, images: ImageLike) -> Result: ...  # type: ignore[overload-overlap]  # an array is both

    @overload
    def score(
        self, images: Iterable[ImageLike], *, errors: Literal["raise"] = ..., progress: bool | None = ...
    ) -> list[Result]: ...

    @overload
    def score(
        self, images: Iterable[ImageLike], *, errors: Literal["return"], progress: bool | None = ...
    ) -> list[Result | ImageError]: ...

    def score(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        errors: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
    ) -> Any:
        """Scores one image, or many of them.

        An image is a path, a URL, the bytes of an image file, a NumPy array (RGB of uint8, or grey of any
        type that files have) or a Pillow image. An array of four dimensions is many images. The score is that
        of the scoring job for the same file. Pillow decodes a JPEG that it has opened in full, while the job
        decodes a large one at a fraction of its size: the score may then differ a little.

        Args:
            errors: what becomes of one of many images that cannot be read: `raise` its error, or `return` it
                in the place of its result.
            progress: whether to show a progress bar for many images; by default in terminals and notebooks.

        Returns:
            A `Result`, or a list of them in the order of the images.

        Raises:
            ImageError: an image cannot be read or decoded.
            WrongUse: something is no image, such as a folder.
        """
        if errors not in ("raise", "return"):
            raise WrongUse(f"errors is 'raise' or 'return', not {errors!r}")
        if _is_one(images):
            source = Source(cast(ImageLike, images), self._store)
            return _or_raise(next(self._results([[self._load(source)]])))
        sources = [Source(image, self._store) for image in cast(Iterable[ImageLike], images)]
        return self._score_many(sources, errors, _is_watched() if progress is None else progress)

    def _score_many(self, sources: Sequence[Source], errors: str, shows_bar: bool) -> list[Any]:
        from tqdm import tqdm

        size = 1 if self.preprocessing.tiling else self._batch_size
        results = []
        with ThreadPoolExecutor(READ_THREADS) as pool:
            loaded = _in_order(pool, self._load, sources, READ_AHEAD * size)
            bar = tqdm(
                self._results(batches(loaded, size)), total=len(sources), unit="image", disable=not shows_bar
            )
            try:
                for result in bar:
                    results.append(result if errors == "return" else _or_raise(result))
            finally:
                bar.close()
                pool.shutdown(wait=False, cancel_futures=True)
        return results

    def _load(self, source: Source) -> Loaded:
        try:
            return source, decode(source.read(), self.preprocessing)
        except ImageError as error:
            return source, ImageError(error.code, f"{source.name}: {error.message}")

    def _results(self, groups: Iterable[Sequence[Loaded]]) -> Iterator[Result | ImageError]:
        """Results and errors in the order of the images."""
        for batch in groups:
            good = [(source, content) for source, content in batch if isinstance(content, DecodedImage)]
            scored = iter(self._scored(good) if good else [])
            for _, content in batch:
                yield next(scored) if isinstance(content, DecodedImage) else content

    def _scored(self, images: Sequence[tuple[Source, DecodedImage]]) -> list[Result]:
        if self.preprocessing.tiling:
            return [self._joined(*image) for image in images]
        pixels_BHWC = torch.from_numpy(np.stack([decoded.pixels_HWC for _, decoded in images]))
        with self._lock:
            form = self._form(1 if len(images) == 1 else None)
            scores = form.submit(pixels_BHWC.to(self._device))()
        return self._judged(images, scores, form)

    def _joined(self, source: Source, decoded: DecodedImage) -> Result:
        """The result of an image that is scored tile by tile."""
        with self._lock:
            form = self._form(None)
            tiled = TiledDetector(form)
            scores = tiled(decoded.pixels_HWC, decoded.height, decoded.width)
        box = tiled.map_box(decoded.height, decoded.width)
        return self._judged([(source, decoded._replace(box=box))], scores, form)[0]

    def _judged(
        self, images: Sequence[tuple[Source, DecodedImage]], scores: Scores, form: InferenceDetector
    ) -> list[Result]:
        judged = judge(scores, self._calibration, self.false_positive_rate)
        require_scores([source.name for source, _ in images], judged, form.form.precision)
        return [self._result(judged, number, *image) for number, image in enumerate(images)]

    def _form(self, batch_size: int | None) -> InferenceDetector:
        """The form for single images or for batches, compiled when it is first wanted."""
        size = batch_size or self._batch_size
        if size not in self._compiled:
            self._compiled[size] = self._forms.form(size)
        return self._compiled[size]

    def _result(self, judged: Judged, number: int, source: Source, decoded: DecodedImage) -> Result:
        one = slice(number, number + 1)
        place = (
            judged.anomaly_map_BHW[one],
            np.array([decoded.height]),
            np.array([decoded.width]),
            np.array([decoded.box]),
        )
        peak_y_B, peak_x_B = peak(*place)
        rule = self._region_rule
        regions = rule and [Region(**found) for found in region_lists(*place, rule)[0].as_py()]
        return Result(
            image_uri=source.image_uri,
            anomaly_score=float(judged.anomaly_score_B[number]),
            p_value=float(judged.p_value_B[number]),
            is_anomalous=bool(judged.is_anomalous_B[number]),
            anomaly_map=judged.anomaly_map_BHW[number].copy(),
            image_height=decoded.height,
            image_width=decoded.width,
            peak_y=float(peak_y_B[0]),
            peak_x=float(peak_x_B[0]),
            global_score=float(judged.global_score_B[number]),
            global_p_value=float(judged.global_p_value_B[number]),
            local_score=None if judged.local_score_B is None else float(judged.local_score_B[number]),
            local_p_value=None if judged.local_p_value_B is None else float(judged.local_p_value_B[number]),
            map_box=decoded.box,
            map_threshold=self.map_threshold,
            regions=regions,
            model_id=self.model_id,
            _source=source,
        )


def _device(setting: Device) -> torch.device:
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WrongUse("device gpu: PyTorch finds no GPU here; choose cpu or auto")
    # Else "float32" is 10 bits of mantissa in cuDNN's convolutions, which moves scores by over a percent.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def _is_one(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    if isinstance(images, str | os.PathLike | bytes | bytearray | Image.Image):
        return True
    return not isinstance(images, Iterable)


def _is_watched() -> bool:
    """Whether somebody sees a progress bar: in a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _or_raise(result: Result | ImageError) -> Result:
    if isinstance(result, ImageError):
        raise result
    return result


def _in_order(
    pool: ThreadPoolExecutor, function: Any, items: Iterable[Source], ahead: int
) -> Iterator[Loaded]:
    """The function of each item in order, with so many of them in the pool at a time."""
    waiting: deque[Future[Loaded]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
