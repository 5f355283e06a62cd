"""The inference forms of a model; compiled backbones for CPUs are kept in the user's cache folder.

With one of these a worker needs neither timm nor OpenVINO's conversion, which take longer than the rest of
its start. Forms from the cache give the scores of new ones, bit for bit. Models with a common backbone have
one file in common, and in a worker of several models one compiled backbone.
"""

import hashlib
import json
import logging
import os
import platform
import secrets
import stat
import zipfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

import csflow
from csflow.model import CpuBackbone, Detector, InferenceDetector, SavedBackbone
from csflow.model_directory import BACKBONE, ROUNDING, ModelFiles, tensor_parts
from csflow.precision import PrecisionSetting, resolved

MOST_BYTES = 1 << 30
"""Of all forms in the folder; those that were not used for longest make room."""
DESCRIPTION = "form.json"


class Forms:
    """Makes inference forms of a model."""

    def __init__(
        self,
        model: ModelFiles,
        precision: PrecisionSetting,
        device: torch.device,
        backbones: MutableMapping[str, CpuBackbone] | None = None,
    ) -> None:
        """
        Args:
            precision: as for `InferenceDetector`.
            backbones: those of models whose forms compute only in turn with these; this model's is added.

        Raises:
            ValueError: the device does not compute in this precision.
        """
        self._model, self._device = model, device
        self._backbones = {} if backbones is None else backbones
        asked = model.architecture.get("precision", "auto") if precision == "auto" else precision
        self._precision = resolved(asked, device)

    @cached_property
    def _detector(self) -> Detector:
        return self._model.detector().to(self._device)

    def form(self, batch_size: int) -> InferenceDetector:
        """The form for batches of this size."""
        if self._device.type != "cpu":
            return InferenceDetector(self._detector, self._precision, batch_size)
        name = f"{self._backbone_id()}-{self._key(batch_size)}.zip"
        if compiled := self._backbones.get(name):
            return InferenceDetector(self._model.head(), self._precision, batch_size, compiled)
        with _private_folder() as folder:
            form = self._kept(folder, name, batch_size) or self._new(folder, name, batch_size)
        if form.backbone:
            self._backbones[name] = form.backbone
        return form

    def _kept(self, folder: int | None, name: str, batch_size: int) -> InferenceDetector | None:
        try:
            saved = None if folder is None else _read(folder, name)
            return saved and InferenceDetector(self._model.head(), self._precision, batch_size, saved)
        except Exception as error:  # whatever zipfile, json and OpenVINO say to damaged files
            _say(f"{name} is made again", error)
            return None

    def _new(self, folder: int | None, name: str, batch_size: int) -> InferenceDetector:
        form = InferenceDetector(self._detector, self._precision, batch_size)
        try:
            if folder is not None and (saved := form.saved()):
                _write(folder, name, saved)
                _make_room(folder)
        except Exception as error:  # a full disk, or a network that OpenVINO cannot export
            _say(f"{name} is not kept", error)
        return form

    def _backbone_id(self) -> str:
        """Hash of what a compiled backbone is made of."""
        # Only rounded weights shift results. The region of interest has been applied to the pixels.
        names = ("mean", "std", BACKBONE, *(() if self._precision == "float32" else (ROUNDING,)))
        architecture = {name: value for name, value in self._model.architecture.items() if name != "mask"}
        described = json.dumps([architecture, self._model.feature_shapes], sort_keys=True)
        digest = hashlib.sha256(described.encode())
        used = {name: value for name, value in self._model.state.items() if name.startswith(names)}
        for part in tensor_parts(used):
            digest.update(part)
        return digest.hexdigest()[:16]

    def _key(self, batch_size: int) -> str:
        """Hash of all but the model that decides what is compiled."""
        import openvino

        parts = [
            *(self._precision, batch_size, torch.get_num_threads()),
            *(csflow.__version__, _code(), openvino.__version__, torch.__version__, version("timm")),
            *(platform.machine(), openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")),
            sorted(torch.cpu.get_capabilities().items()),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _code() -> str:
    """Hash of the sources that make forms: in development they change without a version."""
    digest = hashlib.sha256()
    for path in sorted(Path(csflow.__file__).with_name("model").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _say(what: str, why: object) -> None:
    logging.getLogger(__name__).warning("%s: %s", what, str(why).partition("\n")[0] or type(why).__name__)


@contextmanager
def _private_folder() -> Iterator[int | None]:
    """A descriptor of the folder of forms; None if there can be none, or if others have access."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "csflow" / "forms"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, RuntimeError):  # the latter if nobody's home is known
        yield None
        return
    try:
        found = os.fstat(opened)
        is_private = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077
        if not is_private:
            _say("compiled models are not kept", f"{folder} is not this user's alone")
        yield opened if is_private else None
    finally:
        os.close(opened)


def _read(folder: int, name: str) -> SavedBackbone | None:
    """The form in a file, None if there is none. Raises whatever damaged files lead to."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        return None
    with os.fdopen(file, "rb") as stream, zipfile.ZipFile(stream) as archive:  # which compares checksums
        description = json.loads(archive.read(DESCRIPTION))
        networks = [archive.read(other) for other in archive.namelist() if other != DESCRIPTION]
        with suppress(OSError):  # of a file system that is only read
            os.utime(file)  # it was used now
    return SavedBackbone(description, networks)


def _write(folder: int, name: str, saved: SavedBackbone) -> None:
    new = f".{name}.{secrets.token_hex(4)}"
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        with os.fdopen(file, "wb") as stream, zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(DESCRIPTION, json.dumps(saved.description))
            for number, network in enumerate(saved.networks):
                archive.writestr(f"{number:03d}", network)
        os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(new, dir_fd=folder)
        raise


def _make_room(folder: int) -> None:
    """Removes what was not used for longest, beyond `MOST_BYTES`."""
    files = [(entry.stat().st_mtime, entry.stat().st_size, entry.name) for entry in os.scandir(folder)]
    room = MOST_BYTES
    for number, (_, size, name) in enumerate(sorted(files, reverse=True)):
        room -= size
        if room < 0 and number:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
