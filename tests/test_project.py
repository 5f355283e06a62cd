"""What a project has around its code: workflows, release notes, metadata that agree with each other."""

import re
import runpy
import tomllib

import pytest
import yaml
from conftest import ROOT

from csflow import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
release_notes = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["release_notes"]
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [0.3.0]\n\n- new\n\n## [0.2.0] - 2026-11-26\n\n- old\n"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_pinned_actions_with_few_rights_and_a_limit(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_workflows_call_targets_that_exist_on_the_versions_that_are_promised():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    steps = [
        step.get("run", "")
        for workflow in WORKFLOWS
        for job in yaml.safe_load(workflow.read_text())["jobs"].values()
        for step in job["steps"]
    ]
    called = {name for step in steps for name in re.findall(r"^make (\w+)$", step)}
    assert {"lint", "test", "docs", "wheel", "soak"} <= called <= targets
    check = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    versions = [text[-4:] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert check["jobs"]["test"]["strategy"]["matrix"]["python"] == versions
    assert check["jobs"]["wheel"]["strategy"]["matrix"]["python"] == versions


@pytest.mark.parametrize(
    "file",
    [
        ".github/dependabot.yml",
        ".pre-commit-config.yaml",
        *(f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "idea", "config")),
    ],
)
def test_files_of_the_project_are_yaml(file):
    assert yaml.safe_load((ROOT / file).read_text())


def test_what_a_package_index_shows_has_no_picture_or_link_that_leads_nowhere_there():
    shown = (ROOT / PROJECT["readme"]).read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert len(targets) >= 2
    assert all(target.startswith("https://") for target in targets)
    assert "<img" not in shown


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{__version__}] - {citation['date-released']}\n" in changelog
    assert release_notes(changelog, __version__).startswith("### ")
    images = [
        found
        for path in (ROOT / "cluster").rglob("*")
        if path.suffix == ".yaml" or path.name == "Containerfile"
        for found in re.findall(r"(?:csflow:|newTag: )(\d+\.\d+\.\d+)", path.read_text())
    ]
    assert set(images) == {__version__}


def test_release_notes_are_the_section_of_the_version():
    assert release_notes(CHANGELOG, "0.2.0") == "- old\n"


@pytest.mark.parametrize(
    ("version", "complaint"),
    [("0.3.0", "has no date"), ("0.4.0", "has no section [0.4.0]"), ("Unreleased", "has no date")],
)
def test_a_release_without_dated_notes_is_refused(version, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        release_notes(CHANGELOG, version)
