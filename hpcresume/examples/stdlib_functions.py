"""Measure every public function of the running Python's own standard library.

Run it on this machine or, unchanged, on a Slurm cluster::

    hpcresume submit hpcresume.examples.stdlib_functions --array 4 --collect functions.jsonl

Each source is one file: it is parsed, fans out to its functions and methods, loses the
private ones, and ends as one row per function.  Files that do not parse (CPython ships
some among its own tests) end quarantined; up to 2 % of them are tolerated.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hpcresume as hr

STDLIB = Path(sysconfig.get_path("stdlib"))
_BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.comprehension,
    ast.match_case,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@hr.stage
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file; SyntaxError where it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes, in files that test them
        return ast.parse(path.read_bytes(), filename=str(path))


@hr.stage
def functions(tree: ast.Module) -> Iterator[dict[str, Any]]:
    """Yield one plain dict per function and method, in the order of the file."""
    yield from _functions_in(tree, prefix="")


@hr.stage
def public(function: dict[str, Any]) -> dict[str, Any] | None:
    """Drop functions with a private name anywhere in their qualified name."""
    names = function["qualified_name"].split(".")
    return None if any(name.startswith("_") for name in names) else function


@hr.stage
def measure(function: dict[str, Any], ctx: hr.Context) -> dict[str, Any]:
    """Return the row: size in lines, complexity, number of arguments, docstring."""
    return {
        "file": ctx.source_id,
        "name": function["name"],
        "qualified_name": function["qualified_name"],
        "line": function["line"],
        "lines": function["end_line"] - function["line"] + 1,
        "complexity": 1 + function["branches"],
        "arguments": len(function["arguments"]),
        "has_docstring": function["docstring"] is not None,
    }


def pipeline(root: Path = STDLIB) -> hr.Pipeline:
    """Return the pipeline over the Python files under ``root``."""
    return hr.Pipeline(
        name="stdlib_functions",
        sources=hr.files(root, "**/*.py", exclude=["**/site-packages/**", "**/dist-packages/**"]),
        stages=[parse, functions, public, measure],
        tolerate=0.02,
    )


def _functions_in(node: ast.AST, *, prefix: str) -> Iterator[dict[str, Any]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield _facts(child, prefix + child.name)
            yield from _functions_in(child, prefix=f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions_in(child, prefix=f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _functions_in(child, prefix=prefix)


def _facts(function: Function, qualified_name: str) -> dict[str, Any]:
    return {
        "name": function.name,
        "qualified_name": qualified_name,
        "line": function.lineno,
        "end_line": function.end_lineno,
        "branches": sum(map(_branches, ast.walk(function))),
        "arguments": [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)],
        "docstring": ast.get_docstring(function, clean=False),
    }


def _branches(node: ast.AST) -> int:
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    return isinstance(node, _BRANCHES)
