"""First-order mutants: a program with one of its tokens exchanged."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterator

MUTATIONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
    "*": "+", "//": "*", "/": "*", "%": "+", "+=": "-=", "-=": "+=", "and": "or", "or": "and",
    "True": "False", "False": "True", "not": "", "break": "continue", "max": "min", "min": "max",
}  # fmt: skip
"""Token -> what a mutant has in its place; a number becomes the next one."""


def mutants(prompt: str, solution: str) -> Iterator[tuple[str, str]]:
    """Yield solutions that differ from the given one in one token, and how they differ.

    Args:
        prompt: What stands before it, which stays as it is.
        solution: Python that completes the prompt.
    """
    lines = (prompt + solution).splitlines(keepends=True)
    first = prompt.count("\n") + 1
    for token in tokenize.generate_tokens(io.StringIO(prompt + solution).readline):
        row, column = token.start
        new = _mutated(token)
        if row < first or new is None:
            continue
        line = lines[row - 1]
        changed = line[:column] + new + line[column + len(token.string) :]
        program = "".join([*lines[: row - 1], changed, *lines[row:]])
        if _compiles(program):
            yield program[len(prompt) :], f"{row - first + 1}:{column} {token.string} -> {new}"


def _mutated(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NUMBER and token.string.isdecimal():
        return str(int(token.string) + 1)
    return MUTATIONS.get(token.string) if token.type in (tokenize.OP, tokenize.NAME) else None


def _compiles(program: str) -> bool:
    try:
        compile(program, "candidate", "exec")
    except SyntaxError:
        return False
    return True
