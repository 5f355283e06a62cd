"""Prints what CHANGELOG.md says about a version: the notes of its release.

python .ci/release_notes.py 0.2.0
"""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def release_notes(changelog: str, version: str) -> str:
    """The section of a version, without its heading. Raises ValueError if it is missing, undated or empty."""
    sections = re.split(r"^## ", changelog, flags=re.M)[1:]
    for heading, _, text in (section.partition("\n") for section in sections):
        if heading.startswith(f"[{version}]"):
            if not re.fullmatch(r"\[[\d.]+\] - \d{4}-\d{2}-\d{2}", heading):
                raise ValueError(f"CHANGELOG.md: '## {heading}' has no date, as in [{version}] - 2026-11-26")
            if not text.strip():
                raise ValueError(f"CHANGELOG.md says nothing about {version}")
            return text.strip() + "\n"
    raise ValueError(f"CHANGELOG.md has no section [{version}]; name what was under Unreleased so")


if __name__ == "__main__":
    try:
        print(release_notes(CHANGELOG.read_text(), sys.argv[1]), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")
