"""Which files beside a pipeline's file it imports, also inside of functions."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

_OWN = Path(__file__).parents[1]
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def is_users(path: Path) -> bool:
    """Tell whether a file is the user's own: neither installed (a venv may lie here) nor ours."""
    return not path.is_relative_to(_OWN) and _INSTALLED.isdisjoint(path.parts)


def is_library(directory: Path) -> bool:
    """Tell whether a directory is where installed modules are, which every node has."""
    places = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return str(directory) in places


def sibling_files(files: Iterable[Path], root: Path) -> list[Path]:
    """Return the Python files below ``root`` that ``files`` import, directly or through others.

    Imports are read from the source, so that those that a stage makes only when it is
    called are found too.
    """
    found: dict[Path, None] = {}
    queue = [path for path in files if path.suffix == ".py"]
    while queue:
        for path in _imported(queue.pop(), root):
            if path not in found and is_users(path):
                found[path] = None
                queue.append(path)
    return list(found)


def _imported(path: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # what does not parse is not imported either
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of(root, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = root if node.level == 0 else path.parents[node.level - 1]
            if base.is_relative_to(root):
                for alias in node.names:
                    yield from _files_of(base, ".".join(filter(None, [node.module, alias.name])))


def _files_of(base: Path, dotted: str) -> Iterator[Path]:
    """Yield the file of every module on the way to ``dotted``, packages included."""
    here = base
    for part in dotted.split("."):
        if (here / f"{part}.py").is_file():
            yield here / f"{part}.py"
        here = here / part
        if (here / "__init__.py").is_file():
            yield here / "__init__.py"
        elif not here.is_dir():
            return
