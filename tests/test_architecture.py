"""The one-way flow of docs/architecture.md, read from the imports of the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sensebatch"
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"
SOURCES = sorted(PACKAGE.rglob("*.py"))

NOUNS = {"bounded", "errors", "resolutions", "tasks", "declarations", "jobs", "units"}


def _may_import() -> dict[str, set[str]]:
    """Returns the table of docs/architecture.md: what each module or package may know."""
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    known = {name for names, _ in rows for name in _quoted(names)}
    table: dict[str, set[str]] = {}
    for names, words in rows:
        allowed = _quoted(words)
        if words.startswith("everything"):
            allowed = known - allowed
        elif words.startswith("the nouns"):
            allowed |= NOUNS
        table |= dict.fromkeys(_quoted(names), allowed)
    return table


def _quoted(words: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", words))


MAY_IMPORT = _may_import()

ENGINE_MAY_IMPORT = {
    "model": {"model"},
    "memory": {"memory"},
    "sampling": {"sampling"},
    "tasks": {"tasks", "model", "sampling"},
}
"""What the parts of the engine may know of one another."""

HEAVY = {"torch", "transformers", "accelerate", "flash_attn"}
HEAVY_PACKAGES = {"engine", "tiny"}
MAX_FUNCTION_LINES = 50


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _package(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yields the dotted name of everything imported anywhere in a tree, `from` names included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own(tree: ast.AST) -> Iterator[list[str]]:
    """Yields the parts, below `sensebatch`, of every import of our own."""
    for name in _imports(tree):
        top, *parts = name.split(".")
        if top == "sensebatch" and parts:
            yield parts


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _by_name(path: Path) -> str:
    return _name(path)


@pytest.mark.parametrize("path", SOURCES, ids=_by_name)
def test_module_imports_only_what_its_package_may_know(path: Path) -> None:
    package = _package(path)
    if package == "__init__":
        return
    known = {parts[0] for parts in _own(_tree(path))} - {package, "__version__"}
    assert known <= MAY_IMPORT[package]


def test_every_room_and_module_at_the_top_has_a_row_in_the_document() -> None:
    assert {_package(path) for path in SOURCES} - {"__init__"} == MAY_IMPORT.keys()


def test_nothing_but_the_start_imports_the_command_line() -> None:
    importers = [
        _name(path)
        for path in SOURCES
        if _package(path) not in ("cli", "__main__")
        and any(parts[0] == "cli" for parts in _own(_tree(path)))
    ]
    assert importers == []


@pytest.mark.parametrize("part", sorted(ENGINE_MAY_IMPORT))
def test_parts_of_the_engine_know_only_those_below_them(part: str) -> None:
    known = {
        parts[1]
        for path in (PACKAGE / "engine" / part).glob("*.py")
        for parts in _own(_tree(path))
        if parts[0] == "engine" and (PACKAGE / "engine" / parts[1]).is_dir()
    }
    assert known <= ENGINE_MAY_IMPORT[part]


def test_only_engine_and_tiny_import_torch_and_transformers() -> None:
    importers = {
        _package(path)
        for path in SOURCES
        if any(name.split(".")[0] in HEAVY for name in _imports(_tree(path)))
    }
    assert importers <= HEAVY_PACKAGES


def test_session_and_command_line_import_the_engine_only_inside_functions() -> None:
    for path in (PACKAGE / "loading.py", PACKAGE / "session.py", *(PACKAGE / "cli").glob("*.py")):
        tree = deepcopy(_tree(path))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            function.body = []
        known = {parts[0] for parts in _own(tree)}
        assert not known & HEAVY_PACKAGES, _name(path)


@pytest.mark.parametrize("path", SOURCES, ids=_by_name)
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef):
            documentation = len((ast.get_docstring(node) or "").splitlines())
            num_lines = (node.end_lineno or 0) - node.lineno + 1 - documentation
            assert num_lines < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=_by_name)
def test_packages_hold_no_code_but_the_public_api(path: Path) -> None:
    is_root = path.parent == PACKAGE
    names: set[str] = set()
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        else:
            # The docstring; in the root also the imports for type checkers.
            assert isinstance(node, ast.Expr) or is_root, ast.unparse(node)
            assert {name.split(".")[0] for name in _imports(node)} <= {"typing", "sensebatch"}
    public = {"TYPE_CHECKING", "__version__", "__all__", "__getattr__", "__dir__"}
    assert names <= (public if is_root else set())


def test_only_the_command_line_reads_the_environment() -> None:
    readers = [
        _name(path)
        for path in SOURCES
        if _package(path) != "cli"
        and any(
            isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            for node in ast.walk(_tree(path))
        )
    ]
    assert readers == []
