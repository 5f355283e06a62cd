"""Keeps what benchmarks print in `benchmarks/results.md`: a section each, with machine and command."""

import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("results.md")
LIBRARIES = ("torch", "timm", "ray", "openvino", "pillow", "obstore", "pyarrow")


def record(title: str, body: str, command: str) -> None:
    """Writes a section, in the place of one with the same title if there is one, and prints it."""
    section = f"## {title}\n\n`{command}`\n\n{machine()}\n\n{body.strip()}\n"
    print(section)
    old = RESULTS.read_text() if RESULTS.exists() else "# Results of the benchmarks\n"
    head, *sections = re.split(r"(?m)^(?=## )", old)
    kept = [text.strip() + "\n" for text in sections if not text.startswith(f"## {title}\n")]
    RESULTS.write_text("\n".join([head.strip() + "\n", *kept, section]))


def spread(
    first: str, rows: Mapping[str, Sequence[float]], median: str = "images/s, median", digits: int = 1
) -> str:
    """A table with the median, minimum and maximum of each row; `first` and `median` head columns."""
    lines = [f"| {first} | {median} | minimum | maximum |", "|---|---|---|---|"]
    for name, values in rows.items():
        figures = statistics.median(values), min(values), max(values)
        lines.append(f"| {name} | {' | '.join(f'{figure:.{digits}f}' for figure in figures)} |")
    return "\n".join(lines)


def machine() -> str:
    """Processor, operating system and libraries, in a line."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    family = re.search(r"cpu family\s*: (.*)\nmodel\s*: (.*)", cpuinfo)
    flags = re.search(r"flags\s*: (.*)", cpuinfo)
    features = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flags and name in flags[1].split()
    ]
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{os.cpu_count()} × {model[1] if model else platform.machine()}"
        f"{f' (family {family[1]}, model {family[2]})' if family else ''} ({', '.join(features)}), "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {libraries}"
    )
