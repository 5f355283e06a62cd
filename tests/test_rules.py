"""Which module may know what (docs/architecture.md), told from the sources: none of it is run."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache

import pytest
from conftest import ROOT

from csflow.exporting.bundle import MODULES
from csflow.output.runs import Counts, RunRecord

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("csflow", "jobs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
CSFLOW = [name for name in SOURCES if name.startswith("csflow")]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text())


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(node: ast.AST, with_functions: bool) -> Iterator[ast.AST]:
    """What is executed when a module is imported and, if asked for, when its functions are called."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_for_type_checkers(child) or (is_function and not with_functions):
            continue
        yield child
        yield from nodes(child, with_functions)


@cache
def imports(module: str, with_functions: bool = True) -> frozenset[str]:
    """The modules that a module imports: those of csflow in full, of others the whole name as it stands."""
    found = set()
    for node in nodes(tree(module), with_functions):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module} has a relative import"
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= inner & SOURCES.keys() or {node.module}
    return frozenset(found)


def reached(*modules: str, with_functions: bool = False) -> set[str]:
    """All that importing these modules imports. To import a module is to import the packages around it."""
    waiting, seen = set(modules), set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        parents = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
        more = imports(module, with_functions) if module in SOURCES else frozenset()
        waiting |= (parents | more) - seen
    return seen


def libraries(modules: set[str] | frozenset[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def strings(module: str) -> Iterator[str]:
    """The text in the code of a module, format strings in parts; not its docstrings."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def test_ray_is_imported_in_four_files() -> None:
    assert {module for module in CSFLOW if "ray" in libraries(imports(module))} == {
        "csflow.cluster",
        "csflow.scoring.tally",
        "csflow.training.run",
        "csflow.training.worker",
    }


@pytest.mark.parametrize(
    "module",
    [
        *("jobs.score", "csflow.scoring.job", "csflow.scoring.actor"),
        *("csflow.cli", "csflow.report.job", "csflow.training.config"),
    ],
)
def test_the_driver_imports_no_torch(module: str) -> None:
    assert "csflow.errors" in reached(module)
    assert not {"torch", "timm", "openvino"} & libraries(reached(module))


def test_the_model_knows_no_files_no_cluster_and_no_store() -> None:
    rooms = [module for module in CSFLOW if module.startswith("csflow.model.") or module == "csflow.model"]
    known = set().union(*(imports(module) for module in rooms))
    assert {name for name in known if name.startswith("csflow") and not name.startswith("csflow.model")} == {
        "csflow.interest",
        "csflow.precision",
        "csflow.preprocessing",
    }
    values = {
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "difflib",
        "functools",
        "importlib",
        "logging",
        "math",
        "sys",
        "types",
        "typing",
        "warnings",
    }
    assert libraries(known) <= values | {"csflow", "numpy", "openvino", "timm", "torch", "triton"}
    assert libraries(imports("csflow.precision") | imports("csflow.preprocessing")) <= values | {"torch"}


def test_no_module_imports_one_that_imports_it_inside_of_functions_neither() -> None:
    def path(start: str, module: str, seen: set[str]) -> bool:
        for name in imports(module) & SOURCES.keys() - seen:
            seen.add(name)
            if name == start or path(start, name, seen):
                return True
        return False

    assert [module for module in CSFLOW if path(module, module, set())] == []


def test_the_library_does_not_know_the_jobs() -> None:
    assert not [module for module in CSFLOW if "jobs" in libraries(imports(module))]


def test_the_names_of_partitions_stand_in_one_file() -> None:
    for mark in ("model_id=", "date=", "_runs"):
        found = {module for module in CSFLOW if any(mark in text for text in strings(module))}
        assert found == {"csflow.output.layout"}, mark


def test_run_json_and_its_keys_stand_in_one_file() -> None:
    assert [module for module in CSFLOW if any("run.json" in text for text in strings(module))] == [
        "csflow.output.runs"
    ]
    keys = {name for record in (RunRecord, Counts) for name in record.model_fields if "_" in name}
    # Other records have these, too: rows, model directories, shards and epochs.
    keys -= {"run_id", "format_version", "peak_memory_bytes", "images_per_second"}
    assert len(keys) > 10
    assert {module: keys & set(strings(module)) for module in CSFLOW if keys & set(strings(module))} == {}


def test_the_files_of_a_model_directory_are_named_in_one_file() -> None:
    for name in ("config.json", "calibration.parquet", "model.safetensors"):
        found = {module for module in CSFLOW if name in strings(module)}
        assert found == {"csflow.model_directory"}, name


DECODERS = {"PIL", "imagecodecs", "simplejpeg", "tifffile"}
"""Without all of these, an edge device would give some images other pixels than the job."""
EDGE_LIBRARIES = {"csflow", "numpy", "pyarrow", "scipy"} | DECODERS


def test_the_edge_runtime_holds_all_that_it_imports_and_little_else() -> None:
    needed = reached("csflow.edge.command", "csflow.edge.artefact")
    names = {name.replace("/", ".").removesuffix(".__init__") for name in MODULES}
    assert {"csflow" if name == "__init__" else f"csflow.{name}" for name in names} == needed & SOURCES.keys()
    assert libraries(needed) - sys.stdlib_module_names == EDGE_LIBRARIES


def test_what_only_tests_and_benchmarks_use_is_no_dependency_of_csflow() -> None:
    used = set().union(*(libraries(imports(module)) for module in CSFLOW))
    assert "sklearn" not in used
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith("scikit-learn")]
    assert any(name.startswith("scikit-learn") for name in project["optional-dependencies"]["dev"])
