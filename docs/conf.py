"""The docs site: Sphinx over the Markdown pages of this folder. `make docs` builds it."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent.parent))

from csflow import __version__
from csflow.cli import COMMANDS, load
from csflow.config import JobConfig, help_text, setting_names

project = "csflow"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["quickstart.md"]  # a part of the front page, and what a package index shows
html_theme = "furo"
html_title = f"csflow {__version__}"
html_copy_source = html_show_sourcelink = html_show_sphinx = False
default_role = "code"  # docstrings write `name` as Markdown does
highlight_language = "none"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False}
# The lexer of SQL does not know the structs of DuckDB.
suppress_warnings = ["misc.highlighting_failure"]
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"  # `text` blocks show what is printed


class Settings(SphinxDirective):
    """The settings of every command, one table each, from the docstrings of their fields."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for verb, command in COMMANDS.items():
            if importlib.util.find_spec(command.config.split(":")[0]):
                lines += [f"## csflow {verb}", "", f"{command.summary}.", ""]
                lines += [*self._table(load(command.config)), ""]
        section = nodes.section()
        section.document = self.state.document
        content = StringList(lines, "settings")
        self.state.nested_parse(content, self.content_offset, section, match_titles=True)
        return section.children

    def _table(self, config: type[JobConfig]) -> list[str]:
        def row(name: str) -> str:
            flag = name.upper() if name in config.positional else f"--{name}"
            return f"| `{flag}` | {help_text(config.model_fields[name]).replace('|', chr(92) + '|')} |"

        return ["| setting | |", "|---|---|", *map(row, setting_names(config))]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}
