"""Writes the edge runtime as one Python file, for machines on which csflow is not installed."""

import stat
import zipfile
from pathlib import Path

import csflow

MODULES = (
    "__init__",
    "calibration",
    "damage",
    "decode_limits",
    "edge/__init__",
    "edge/artefact",
    "edge/command",
    "errors",
    "exif",
    "images",
    "interest",
    "output/__init__",
    "output/layout",
    "output/schemas",
    "parquet",
    "preprocessing",
    "regions",
    "scoring/__init__",
    "scoring/rows",
    "wide_samples",
)
"""The modules that the runtime imports; tests/test_rules.py holds this list to its imports."""
START = "from csflow.edge.command import main\n\nmain()\n"


def write_runtime(file: Path) -> None:
    """Writes a zipapp (PEP 441): `python csflow-edge.pyz …` runs it."""
    package = Path(csflow.__file__).parent
    with file.open("wb") as target:
        target.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for module in MODULES:
                archive.write(package / f"{module}.py", f"csflow/{module}.py")
            archive.writestr("__main__.py", START)
    file.chmod(file.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
