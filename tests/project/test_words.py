"""Names and words: no class name twice, package docstrings name modules that exist, US spelling."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.paths import ROOT

ROOT = ROOT / "edgeq"

NO_MODULES = {"quant/training": {"distill", "qat", "adaround"}}
"""Names in a package's docstring that stand for something else than modules."""

_LISTED = re.compile(r"^    ([a-z]\w*)((?:[,/ ]+[a-z]\w*)*) {2,}\S", re.MULTILINE)
"""A line of a package docstring that begins with the name of a module."""


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


def taken_twice() -> set[str]:
    names = Counter(
        node.name
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    return {name for name, count in names.items() if count > 1}


def test_a_class_name_is_used_once() -> None:
    assert not taken_twice()


def unknown_modules(package: Path) -> list[str]:
    """Names in a package's docstring that are neither modules nor defined in it."""
    tree = ast.parse((package / "__init__.py").read_text("utf-8"))
    text = ast.get_docstring(tree, clean=False) or ""
    named = [
        name for first, more in _LISTED.findall(text) for name in (first, *re.findall(r"\w+", more))
    ]
    known = NO_MODULES.get(package.relative_to(package.parents[1]).as_posix(), set())
    known |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return [
        name
        for name in named
        if not (package / name).is_dir()
        and not (package / f"{name}.py").exists()
        and name not in known
    ]


@pytest.mark.parametrize(
    "package",
    sorted(p.parent for p in modules() if p.name == "__init__.py"),
    ids=lambda p: p.relative_to(ROOT.parent).as_posix(),
)
def test_a_package_s_docstring_names_what_is_there(package: Path) -> None:
    assert not unknown_modules(package)


def test_a_module_that_is_gone_is_found(tmp_path: Path) -> None:
    (tmp_path / "here.py").touch()
    (tmp_path / "__init__.py").write_text('"""Two.\n\n    here     is\n    gone     is not\n"""\n')
    assert unknown_modules(tmp_path) == ["gone"]


_DOTTED = re.compile(r"(?<!`)`edgeq\.([\w.]+)`(?!`)")
"""A module or what it defines, named in a docstring; keys of metadata stand in double backticks."""


def names_of(module: Path) -> set[str]:
    """What a module or package defines or imports at its top level."""
    if module.is_dir():
        return {p.stem for p in module.iterdir()} | names_of(module / "__init__.py")
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def unknown_references(text: str) -> list[str]:
    """Dotted names in a text for which there is no module, or nothing in their module."""
    unknown = []
    for dotted in _DOTTED.findall(text):
        place, rest = ROOT, dotted.split(".")
        while rest and (place / rest[0]).is_dir():
            place, rest = place / rest[0], rest[1:]
        if rest and (place / f"{rest[0]}.py").exists():
            place, rest = place / f"{rest[0]}.py", rest[1:]
        if rest and not set(rest) & names_of(place):
            unknown.append(f"edgeq.{dotted}")
    return unknown


def test_docstrings_name_what_is_there() -> None:
    repository = ROOT.parent
    texts = [
        *modules(),
        *sorted((repository / "docs").glob("*.md")),
        repository / "CONTRIBUTING.md",
    ]
    unknown = {
        f"{path.relative_to(repository)}: {name}"
        for path in texts
        for name in unknown_references(path.read_text("utf-8"))
    }
    # the Python API is in a table of strings, not of definitions
    public = re.findall(r'"(\w+)"', (ROOT / "__init__.py").read_text("utf-8"))
    assert not {one for one in unknown if one.rpartition(".")[2] not in public}


def test_a_name_that_is_gone_is_found() -> None:
    text = "See `edgeq.model.block.BlockSpec`, `edgeq.model.block.Gone` and `edgeq.gone.gone`."
    assert unknown_references(text) == ["edgeq.model.block.Gone", "edgeq.gone.gone"]


BRITISH = re.compile(
    "(?i)colour|neighbour|behaviour|favour|honour|equalis|quantis|normalis|recognis|modernis|"
    "(?:initial|serial|summar|vector|general|minim|maxim|synchron|special|stabil|visual|util)is[ei]|"
    "optimis[ei]|organis[ei]|parallelis[ei]|labell(?:ed(?!by)|ing)|modell(?:ed|ing)|cancell(?:ed(?!Error)|ing)|"
    "centre|artefact|licence|catalogue|analys(?:e[ds]?\\b|ing)|programmes?\\b|towards|\\bgrey"
)
"""British spellings; HTML's aria-labelledby and asyncio's CancelledError are none."""

_QUOTED = re.compile('[`"]equalise[`"]')
"""The old spelling of a key of recipe files, where a text explains that it is still read."""

OLD_SPELLINGS = {
    # what recipe files of earlier versions say, a text that models are compared on, stories, and
    # a misspelled name that must be refused
    "edgeq/quant/recipe_file.py", "edgeq/quant/presets.py", "tests/quant/graph/test_recipe.py",
    "edgeq/converters/validate/prompts.py", "edgeq/demo_model/README.md",
    "tests/project/test_public_api.py", "tests/project/test_words.py",
}  # fmt: skip
"""Files in which a British spelling has a reason."""


def test_spelling_is_american() -> None:
    repository = ROOT.parent
    found = []
    for folder in ("edgeq", "tests", "docs", "benchmarks", "examples", "."):
        below = (repository / folder).glob("*" if folder == "." else "**/*")
        for path in below:
            relative = path.relative_to(repository).as_posix()
            if path.suffix not in (".py", ".md", ".toml", ".html", ".css") or path.is_symlink():
                continue
            if relative in OLD_SPELLINGS or relative.startswith("tests/data"):
                continue
            text = _QUOTED.sub("", path.read_text("utf-8"))
            for number, line in enumerate(text.splitlines(), 1):
                found += [f"{relative}:{number}: {word}" for word in BRITISH.findall(line)]
    assert not found, "\n".join(found)
