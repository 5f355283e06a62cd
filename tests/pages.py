"""The documentation as tests read it: pages and the code blocks in them."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
_FENCE = re.compile(r"^(`{3,})(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: Path
    line: int
    heading: str
    """Text of the heading above it."""
    language: str
    words: frozenset[str]
    """What stands after the language: which engines a block is for, and what it does."""
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """All code blocks of a page, in order."""
    heading, fence, opened, lines = "", "", 0, []
    info: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        match = _FENCE.match(line)
        if fence and match and match[1] == fence:
            yield Block(
                page, opened, heading, (info or [""])[0], frozenset(info[1:]), "\n".join(lines) + "\n"
            )
            fence = ""
        elif fence:
            lines.append(line)
        elif match:
            fence, info, opened, lines = match[1], match[2].split(), number, []
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def run_python(block: Block, names: dict[str, Any]) -> Any:
    """Runs a block as a notebook would, and returns the value of its last expression."""
    module = ast.parse(block.code, str(block.page))
    last = module.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(module, str(block), "exec"), names)
        return None
    exec(compile(ast.Module(module.body[:-1], []), str(block), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(block), "eval"), names)


def statements(block: Block) -> list[str]:
    """The SQL statements of a block, without their semicolons."""
    return [text.strip() for text in block.code.split(";\n") if text.strip()]
