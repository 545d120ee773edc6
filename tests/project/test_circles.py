"""No two modules import each other, neither directly nor through others.

Imports inside functions count; those for types alone do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.paths import ROOT


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Each import in a syntax tree but those under ``if TYPE_CHECKING``."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
        return
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse
    for child in children:
        yield from statements(child)


def imports(path: Path, name: str, known: Iterable[str]) -> set[str]:
    """The modules among the known ones that a module imports itself."""
    known = set(known)
    names: set[str] = set()
    for statement in statements(ast.parse(path.read_text("utf-8"))):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
            continue
        base = statement.module or ""
        if statement.level:
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            package = package[: len(package) - statement.level + 1]
            base = ".".join([*package, *filter(None, [base])])
        for alias in statement.names:
            module = f"{base}.{alias.name}"
            names.add(module if module in known else base)
    return (names & known) - {name}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            place = stack.index(module)
            components.append(sorted(stack[place:]))
            del stack[place:]

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return [component for component in components if len(component) > 1]


def import_graph(root: Path) -> dict[str, set[str]]:
    """Each module of the package edgeq below a folder, and the modules it imports."""
    paths = {module_name(path, root): path for path in sorted((root / "edgeq").rglob("*.py"))}
    return {name: imports(path, name, paths) for name, path in paths.items()}


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph(ROOT)
    assert len(graph) > 400
    assert not circles(graph)


def test_a_circle_through_a_function_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "edgeq"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("from edgeq.b import x\n")
    (folder / "b.py").write_text("def f():\n    from . import c\n")
    (folder / "c.py").write_text("if True:\n    import edgeq.a\n")
    (folder / "d.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from edgeq.e import x\n"
    )
    (folder / "e.py").write_text("from edgeq import d\n")
    assert circles(import_graph(tmp_path)) == [["edgeq.a", "edgeq.b", "edgeq.c"]]
