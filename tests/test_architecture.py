"""The house stands: who may import whom, who may print, where trio may live. Found by reading every module's code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# importer -> imported. Every room may use itself and errors; __init__ only holds the version.
ARROWS = {
    "errors": set[str](),
    "block": {"errors"},
    "protocol": {"errors"},
    "tls": {"errors"},
    "certificates": {"errors"},
    "locking": {"errors", "block"},
    "formats": {"errors", "block"},
    "partitions": {"errors", "block"},
    "client": {"errors", "protocol", "block", "tls"},
    "server": {"errors", "protocol", "block", "tls"},
    "opening": {"errors", "formats", "partitions", "client", "block", "locking"},
    "imagetools": {"errors", "opening", "formats", "block", "locking"},
    "kernel": {"errors", "protocol"},
    "cli": {
        *("errors", "server", "imagetools", "kernel", "opening", "client", "protocol", "block", "tls", "certificates"),
        "fusemount",
    },
    "__main__": {"cli"},
    "__init__": set[str](),
}

STANDARD_LIBRARY_ONLY = ("errors", "block", "protocol")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room(path: Path) -> str:
    """The room that a module of nbdserve stands in."""
    return path.relative_to(ROOT / "nbdserve").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The dotted names that a module imports anywhere in it, lazily too, with line numbers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call):  # import_module("..."), and tables of names for it
            for argument in node.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("nbdserve."):
                    yield f"{argument.value}.", node.lineno


def rooms_imported(path: Path) -> Iterator[tuple[str, int]]:
    """The rooms (or fusemount) that a module imports from."""
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "fusemount":
            yield "fusemount", line
        elif parts[0] == "nbdserve" and len(parts) > 1 and parts[1] != "__version__":
            yield parts[1], line


@pytest.mark.parametrize("path", modules("nbdserve"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    here = room(path)
    assert here in ARROWS, f"{here} is no room of the house; add its arrows"
    allowed = ARROWS[here] | {here}
    wrong = [f"{path}:{line}: {here} -> {there}" for there, line in rooms_imported(path) if there not in allowed]
    assert not wrong, "\n".join(wrong)


def test_every_way_to_import_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import os, nbdserve.server.listen\n"
        "from nbdserve import tls, __version__\n"
        "def lazily():\n"
        "    from nbdserve.client import connect\n"
        "    import fusemount.vfs\n"
        "table = opener('nbdserve.formats.raw')\n"
    )
    rooms = [("server", 1), ("tls", 2), ("client", 4), ("fusemount", 5), ("formats", 6)]
    assert sorted(rooms_imported(source), key=lambda found: found[1]) == rooms


def test_the_arrows_go_one_way() -> None:
    TopologicalSorter(ARROWS).prepare()  # raises CycleError


def test_files_within_a_room_go_one_way() -> None:
    """Modules do not import each other in a circle at the top level, where the order of imports would matter."""
    graph: dict[str, set[str]] = {}
    for path in modules("nbdserve"):
        tree = ast.parse(path.read_text())
        found = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        graph[dotted(path)] = found
    TopologicalSorter(graph).prepare()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules("nbdserve"), ids=lambda path: str(path.relative_to(ROOT)))
def test_trio_lives_at_the_edges(path: Path) -> None:
    if room(path) in ("server", "cli") or path.relative_to(ROOT / "nbdserve").parts[:2] == ("client", "trio.py"):
        return
    used = [line for name, line in imports(path) if name.split(".")[0] in ("trio", "asyncio", "pyfuse3")]
    assert not used, f"{path}: asynchronous code in the synchronous core, lines {used}"


@pytest.mark.parametrize("path", modules("nbdserve"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_needs_nothing_but_the_standard_library(path: Path) -> None:
    if room(path) in STANDARD_LIBRARY_ONLY:
        foreign = {name.split(".")[0] for name, _ in imports(path)} - sys.stdlib_module_names - {"nbdserve"}
        assert not foreign, f"{path}: {foreign}"


@pytest.mark.parametrize("path", modules("nbdserve"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_commands_print(path: Path) -> None:
    if room(path) != "cli":
        prints = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input"))
            or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"))
        ]
        assert not prints, f"{path}: lines {prints}"


def test_every_file_is_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in [*modules("nbdserve"), *modules("fusemount")]}
    assert not [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > 600]
