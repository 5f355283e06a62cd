"""The documentation: the site builds, links lead somewhere, and code blocks are what they say."""

import ast
import html
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import pytest
import sqlglot
import yaml
from conftest import ROOT
from pages import DOCS, Block, blocks, run_python, statements
from scored_output import write_output, write_record

from csflow import cli
from csflow.config import build_parser
from csflow.errors import TRANSIENT, ErrorCode
from csflow.output.schemas import ERRORS, SCORES
from csflow.tables.job import RegisterConfig, register

PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"])
BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def prose(page: Path) -> str:
    """The page without code."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`]*`", "`code`", text)


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them from headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", DOCS, folder]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


class Elements(HTMLParser):
    """Addresses of what a browser fetches to show a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe", "link"):
            self.fetched.append(attributes.get("src") or attributes.get("href") or "")


def test_the_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        assert not [a for a in Elements(page.read_text()).fetched if a.startswith(("http", "//"))], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


def test_the_front_page_has_installation_picture_commands_and_result(site):
    page = (site / "index.html").read_text()
    assert "report.png" in page
    text = re.sub(r"<[^>]+>", "", page)
    for expected in (
        "pip install 'csflow[demo]'",
        "csflow train --input",
        "image_auroc",
        "cell1627-poly.png",
    ):
        assert expected in html.unescape(text), expected


def test_code_can_be_copied_and_diagrams_are_drawn_beforehand(site):
    assert "copybutton.js" in (site / "queries.html").read_text()
    assert (site / "_static" / "copybutton.js").exists()
    for source in (DOCS / "images").glob("*.mmd"):
        assert (site / "_images" / source.with_suffix(".svg").name).exists()
    assert not [block for block in BLOCKS if block.language == "mermaid"]


def test_the_settings_page_has_every_setting_of_every_command(site):
    page = (site / "reference" / "settings.html").read_text()
    for verb, command in cli.COMMANDS.items():
        if f'id="csflow-{verb}"' not in page:
            with pytest.raises(ModuleNotFoundError):
                cli.load(command.config)
            continue
        section = page.split(f'id="csflow-{verb}"')[1].split("<section")[0]
        for name in cli.load(command.config).model_fields:
            assert f"--{name}<" in section or f">{name.upper()}<" in section, (verb, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_python_and_yaml_blocks_parse():
    assert of("python")
    for block in of("python"):
        ast.parse(block.code, str(block))
    for block in of("yaml"):
        yaml.safe_load(block.code)


def test_sql_blocks_are_sql():
    for block in of("sql"):
        dialects = block.words & {"duckdb", "athena", "trino", "spark"} or {"duckdb"}
        if "CALL" not in block.code:
            for dialect in dialects:
                sqlglot.parse(block.code, dialect=dialect)


def test_shell_blocks_parse():
    for block in of("bash"):
        parsed = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
        assert parsed.returncode == 0, f"{block}: {parsed.stderr}"


def test_commands_in_shell_blocks_have_settings_that_exist():
    checked = 0
    for block in of("bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.split(" -- ")[-1], comments=True)
            if words[:1] == ["python"] and words[1:] and words[1].startswith("jobs/"):
                words = ["csflow", Path(words[1]).stem, *words[2:]]
            if words[:1] == ["csflow"] and words[1] in cli.COMMANDS:
                command = cli.COMMANDS[words[1]]
                build_parser(cli.load(command.config), None).parse(words[2:])
                checked += 1
    assert checked > 10


def test_the_tutorials_question_has_an_answer(tmp_path, monkeypatch):
    write_output(tmp_path / "demo" / "scores", range(2))
    monkeypatch.chdir(tmp_path)
    [question] = [block for block in blocks(DOCS / "tutorial.md") if block.language == "python"]
    assert len(run_python(question, {}).fetchall()) == 5


def test_the_history_of_runs_is_read_by_duckdb_and_pandas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "demo" / "scores"
    write_record(output, "20261102T0200Z-a", counts={"errors_in_this_run": {"corrupt": 4, "timeout": 1}})
    write_record(output, "20261103T0200Z-b", status="incomplete", exit_status=3, drift=None)
    (output / "_runs" / "20261104T0200Z-cut-off").mkdir()
    page = list(blocks(DOCS / "howto" / "run-history.md"))
    of_runs, of_errors = (duckdb.sql(statements(block)[0]).df() for block in page if block.language == "sql")
    assert list(of_runs.run_id) == ["20261103T0200Z-b", "20261102T0200Z-a"]
    assert list(of_runs.exit_status) == [3, 0]
    assert list(of_runs.minutes) == [10, 10]
    assert of_errors.values.tolist() == [
        ["20261102T0200Z-a", "corrupt", 4],
        ["20261102T0200Z-a", "timeout", 1],
    ]
    [block] = [block for block in page if block.language == "python"]
    runs = run_python(block, {})
    assert list(runs["counts.scored_in_this_run"]) == [3, 3]
    assert runs.loc["20261102T0200Z-a", "drift.share_below_5_percent"] == 0.125


def test_a_registered_table_is_read_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = write_output(tmp_path / "scores", range(17, 20))
    register(RegisterConfig(scores=str(output), format="iceberg", catalog="sqlite:///catalog.db"))
    [read] = [block for block in blocks(DOCS / "howto" / "table-formats.md") if block.language == "python"]
    frame = run_python(read, {})
    assert set(frame.date.astype(str)) == {"2026-11-20", "2026-11-21"}


def names_in_table(page: Path, heading: str) -> list[str]:
    """The names in the first column."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return re.findall(r"`(\w+)`", " ".join(cells))


def test_the_columns_of_the_output_are_those_of_the_schemas():
    page = DOCS / "reference" / "output.md"
    assert names_in_table(page, "scores") == SCORES.names
    assert names_in_table(page, "errors") == ERRORS.names


def test_the_codes_that_are_tried_again_are_the_transient_ones():
    rows = [line for line in (DOCS / "howto" / "errors.md").read_text().splitlines() if line.startswith("| ")]
    transient, permanent = (set(re.findall(r"`([a-z_]+)`", row)) for row in rows[1:])
    assert transient == set(TRANSIENT)
    assert permanent < set(ErrorCode) - TRANSIENT
