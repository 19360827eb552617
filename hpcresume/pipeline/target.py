"""What a target on the command line names: a Python file or a module, and a name in it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpcresume.errors import PipelineError

DEFAULT_ATTR = "pipeline"
"""Name of the pipeline in a file where the target gives none."""


class PipelineSpec(msgspec.Struct, frozen=True):
    """Where a pipeline is.

    Attributes:
        target: As given on the command line.
        kind: ``file`` or ``module``.
        path: The Python file.
        module: Name under which the file is imported.
        attr: Name of the pipeline in it; None: find it.
        import_root: Directory that the module's package was found in; None for a module
            without a package.
    """

    target: str
    kind: Literal["file", "module"]
    path: Path
    module: str
    attr: str | None
    import_root: Path | None = None


def parse_target(text: str, cwd: Path) -> PipelineSpec:
    """Tell what ``file.py``, ``file.py:attr``, ``module`` or ``module:attr`` names.

    Args:
        text: The target as a user gives it.
        cwd: Directory that relative files and modules are looked up from.

    Raises:
        PipelineError: There is no such file or module.
    """
    location, attr = split_target(text)
    if location.endswith(".py") or "/" in location:
        return _file_spec(text, cwd / os.path.expanduser(location), attr)
    return _module_spec(text, location, attr, cwd)


def split_target(text: str) -> tuple[str, str | None]:
    """Return a target's file or module, and the name after the colon if there is one."""
    location, colon, attr = text.rpartition(":")
    if colon and location and (attr.isidentifier() or location.endswith(".py")):
        if not attr.isidentifier():
            raise PipelineError(f"{text}: {attr!r} is not a Python name. Write file.py:name.")
        return location, attr
    return text, None


def target_of(pipeline: str | os.PathLike[str] | Callable[..., Any]) -> str:
    """Return what names a pipeline on the command line.

    Args:
        pipeline: The name itself, a path, or the pipeline function, imported from a file.

    Raises:
        PipelineError: A function that array tasks could not import, or something else.
    """
    if isinstance(pipeline, str | os.PathLike):
        return os.fspath(pipeline)
    name = getattr(pipeline, "__qualname__", "")
    module = sys.modules.get(getattr(pipeline, "__module__", ""), None)
    if not callable(pipeline) or not name:
        raise PipelineError(
            f"a {type(pipeline).__name__} cannot be submitted: array tasks build the pipeline "
            "themselves, from a file. Write a function that returns it to a file, and give "
            "hr.submit('pipeline.py')."
        )
    # Loading a pipeline puts a module of its own in place of the one that was imported.
    scopes = [getattr(module, "__dict__", {}), getattr(pipeline, "__globals__", {})]
    scope = next((one for one in scopes if one.get(name) is pipeline), scopes[0])
    path = scope.get("__file__")
    code = getattr(pipeline, "__code__", None)
    if not path or (code is not None and not os.path.isfile(code.co_filename)):
        raise PipelineError(
            f"the pipeline {name!r} is defined in a notebook or at the prompt, where array tasks "
            "on other nodes cannot load it from. Write its cell to a file (in Jupyter with "
            "%%writefile pipeline.py as the cell's first line), then: hr.submit('pipeline.py')."
        )
    if not name.isidentifier() or scope.get(name) is not pipeline:
        raise PipelineError(
            f"the pipeline {name!r} is defined within a function of {path}, where array tasks "
            "cannot find it. Define it at the top level of the file."
        )
    return f"{os.path.abspath(path)}:{name}"


def _file_spec(target: str, path: Path, attr: str | None) -> PipelineSpec:
    path = Path(os.path.abspath(path))
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "there is no such file"
        raise PipelineError(
            f"{target}: {what}.{_near_files(path)} Give a Python file, or module:attr.",
            path=str(path),
        )
    return PipelineSpec(target, "file", path, path.stem.replace(".", "_"), attr)


def _near_files(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _module_spec(target: str, name: str, attr: str | None, cwd: Path) -> PipelineSpec:
    if not all(part.isidentifier() for part in name.split(".")):
        raise PipelineError(
            f"{target}: neither a Python file nor a module. Give file.py[:attr] or module[:attr]."
        )
    root = os.path.abspath(cwd)
    with _importable([root]), no_bytecode():
        importlib.invalidate_caches()
        found = _find_module(target, name)
        if found.submodule_search_locations is not None:
            raise PipelineError(
                f"{target}: {name} is a package. Name the module in it: {name}.module[:attr]."
                f"{_near_modules(f'{name}.{DEFAULT_ATTR}', cutoff=0.0)}"
            )
    if not found.has_location or not str(found.origin).endswith(".py"):
        raise PipelineError(f"{target}: {name} has no Python file. Give one that has.")
    path = Path(os.path.abspath(str(found.origin)))
    depth = name.count(".")
    return PipelineSpec(target, "module", path, name, attr, path.parents[depth] if depth else None)


def _find_module(target: str, name: str) -> importlib.machinery.ModuleSpec:
    parent = name.rpartition(".")[0]
    try:
        # Not what is imported already: that may be a run's copy of it.
        where = importlib.import_module(parent).__path__ if parent else None
        found = importlib.machinery.PathFinder.find_spec(name, where)
        found = found or importlib.util.find_spec(name)
    except (ModuleNotFoundError, AttributeError):  # no parent, or one that is no package
        found = None
    except Exception as error:
        raise PipelineError(
            f"{target}: the package {parent} cannot be imported: {error!r}."
        ) from error
    if found is None:
        raise PipelineError(
            f"{target}: there is no module {name} that Python can import from here."
            f"{_near_modules(name)} Give a file.py, or check that the module is installed."
        )
    return found


def _near_modules(name: str, *, cutoff: float = 0.6) -> str:
    parent, _, leaf = name.rpartition(".")
    module = sys.modules.get(parent)
    paths = getattr(module, "__path__", None) if parent else None
    if parent and paths is None:
        return ""
    names = [found.name for found in pkgutil.iter_modules(paths)]
    near = difflib.get_close_matches(leaf, names, n=3, cutoff=cutoff)
    prefix = f"{parent}." if parent else ""
    return f" Did you mean {' or '.join(prefix + n for n in near)}?" if near else ""


@contextlib.contextmanager
def _importable(paths: list[str]) -> Iterator[None]:
    sys.path[:0] = paths
    try:
        yield
    finally:
        for entry in paths:
            sys.path.remove(entry)


@contextlib.contextmanager
def no_bytecode() -> Iterator[None]:
    """Leave no ``__pycache__`` beside the user's files or in the run."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
