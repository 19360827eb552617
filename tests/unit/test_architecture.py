"""The shape of the package: arrows between rooms, confinement, size, and what help imports."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hpcresume
from tests.support.places import REPOSITORY, run_child

PACKAGE = REPOSITORY / "hpcresume"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOOR = {"errors", "ids", "failpoints", "deadline", "memory", "updates"}
"""What every room may import."""

RUN = {"fs", "segment", "run"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "ids": set(),
    "failpoints": set(),
    "deadline": set(),
    "memory": set(),
    "updates": set(),
    "fs": set(),
    "config": set(),
    "slurm": set(),
    "pipeline": RUN,
    "testbed": {"slurm"},
    "segment": {"fs"},
    "run": {"fs", "segment"},
    "ledger": RUN,
    "merge": RUN,
    "sinks": {"segment"},
    "observe": RUN | {"merge", "slurm"},
    "output": RUN | {"merge", "observe", "pipeline", "sinks"},
    "serving": {"fs", "pipeline"},
    "engine": RUN | {"pipeline", "ledger", "sinks"},
    "task": RUN | {"engine", "ledger", "merge", "config", "slurm", "pipeline"},
    "launch": RUN | {"task", "engine", "merge", "config", "slurm", "pipeline", "output", "observe"},
    "api": RUN | {"config", "launch", "merge", "observe", "output", "pipeline"},
    "doctor": {"engine", "slurm", "fs", "config", "run"},
    "evals": RUN | {"launch", "pipeline", "output", "merge", "sinks"},
    "examples": {"(public)", "serving"},
}
"""Room -> the rooms below it that it may import.  cli, above all, may import any."""

CONFINED: dict[str, tuple[str, ...]] = {
    "ray": ("engine/", "task/driver.py", "serving/", "doctor/"),
    "submitit": ("launch/",),
    "lmdb": ("ledger/",),
    "subprocess": ("slurm.py", "task/", "launch/", "testbed/", "engine/", "doctor/",
                   "pipeline/context.py", "pipeline/child.py", "examples/"),
    # submitit loads one pickle of ours: a function by its name, and a string.  Buffers of
    # serving name the type with which Ray maps memory, and pickle nothing.
    "pickle": ("engine/", "serving/buffers.py"),
    "cloudpickle": ("engine/", "launch/submitit_executor.py", "launch/trial.py"),
    "torch": ("serving/torch_transport.py", "examples/"),
    "marshal": (), "shelve": (), "dill": (), "yaml": (),
    "multiprocessing": (),
}  # fmt: skip
"""Module -> the only places that import it."""

SLEEPERS = {
    "cli/merge.py": "a controller that does not answer says nothing when it is back",
    "cli/drive.py": "asks Slurm at intervals until the run ends",
    "doctor/across.py": "when another node's file becomes visible has no event",
    "engine/pool.py": "with nothing under way there is nothing to wait for",
    "engine/ray_pool.py": "with nothing under way there is nothing to wait for",
    "launch/stopping.py": "Slurm has no event for the end of a job",
    "testbed/processes.py": "Slurm's daemons have no event for being up",
}
"""Files that may sleep, each with the reason why there is nothing to wait for."""

LONGEST_FUNCTION = 60


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted name of every module imported anywhere in a file, late ones too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: imports are absolute"
            if node.module == "hpcresume":
                yield from (f"hpcresume.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def imported_room(module: str) -> str | None:
    """Return the room of one of the package's modules, ``(public)`` for its public names."""
    top, _, rest = module.partition(".")
    if top != "hpcresume":
        return None
    room = rest.partition(".")[0]
    is_room = (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
    return room if room and is_room else "(public)"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """A room imports the rooms below it that the design names, and no other."""
    room = room_of(path)
    if room in ("__init__", "__main__", "cli"):
        return
    allowed = ARROWS[room] | FLOOR | {room}
    below = {imported_room(module) for module in imports_of(path)} - {None}
    assert set() == below - allowed


def test_the_arrows_have_no_cycle() -> None:
    """No room can reach itself."""

    def reach(room: str, seen: tuple[str, ...]) -> None:
        assert room not in seen, " -> ".join((*seen, room))
        for below in ARROWS.get(room, ()):
            reach(below, (*seen, room))

    for room in ARROWS:
        reach(room, ())


def test_no_public_name_is_a_room() -> None:
    """An import of a room leaves no module under a public name of the package."""
    assert set() == set(hpcresume.__all__) & {room_of(path) for path in FILES}


@pytest.mark.parametrize("module", sorted(CONFINED))
def test_third_parties_are_confined(module: str) -> None:
    """Each of these modules is imported in its places only."""
    places = CONFINED[module]
    found = {
        name_of(path)
        for path in FILES
        for imported in imports_of(path)
        if imported.partition(".")[0] == module
    }
    assert set() == {name for name in found if not name.startswith(places or "\0")}


def calls_of(path: Path) -> Iterator[str]:
    """Yield the text of every called name in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func)


def test_nothing_sleeps_without_a_reason() -> None:
    """Conditions are waited for; the exceptions are named, with a reason."""
    found = {name_of(path) for path in FILES if "time.sleep" in set(calls_of(path))}
    for path in FILES:
        assert "sleep" not in set(calls_of(path)), f"{name_of(path)}: call it time.sleep"
    assert set() == found - set(SLEEPERS)


BLOCKING = {"ray.get", "ray.wait", "time.sleep"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_blocks_an_event_loop(path: Path) -> None:
    """No coroutine calls what blocks its loop: Ray's get and wait, and sleeps."""
    found = {
        (function.name, call)
        for function in ast.walk(tree_of(path))
        if isinstance(function, ast.AsyncFunctionDef)
        for call in _called_in(function)
        if call in BLOCKING
    }
    assert set() == found


def _called_in(function: ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield what a coroutine calls itself, functions that it defines left out."""
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func)
        left += ast.iter_child_nodes(node)


def test_no_bytes_become_code() -> None:
    """Nothing evaluates text, and objects are unpickled on the way to and from workers only."""
    forbidden = {"eval", "exec", "yaml.load", "pickle.load", "pickle.loads", "cloudpickle.load",
                 "cloudpickle.loads"}  # fmt: skip
    found = {
        (name_of(path), call)
        for path in FILES
        if not name_of(path).startswith("engine/")
        for call in forbidden & set(calls_of(path))
    }
    assert set() == found
    in_engine = {c for p in FILES if name_of(p).startswith("engine/") for c in calls_of(p)}
    assert set() == in_engine & {"eval", "exec", "yaml.load"}


def test_only_the_command_line_prints() -> None:
    """print() stands in cli/ and in the supervisor, which writes the array task's log."""
    found = {name_of(path) for path in FILES if "print" in set(calls_of(path))}
    assert set() == {
        name for name in found if not name.startswith(("cli/", "task/supervisor.py", "examples/"))
    }


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    """No function has more than 60 lines, its docstring included."""
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions_of(path)}
    assert {} == {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    """Every module has a docstring, unless it is empty."""
    assert ast.get_docstring(tree_of(path)) or not tree_of(path).body


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_names_have_docstrings(path: Path) -> None:
    """Every public class and function of a module, and public method, says what it does."""

    def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = {ast.unparse(d).partition("(")[0] for d in node.decorator_list}
            overload = bool(decorators & {"overload", "override", "typing.overload"})
            if node.name.startswith("_") or overload:
                continue
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")

    if any(part.startswith("_") and part != "__init__.py" for part in path.parts):
        return
    strict = room_of(path) in {"fs", "ids", "errors", "failpoints", "segment", "run", "merge",
                               "ledger"}  # fmt: skip
    found = list(undocumented(tree_of(path).body, ""))
    if not strict:
        found = [name for name in found if "." not in name]
    assert [] == found


HEAVY = ("ray", "submitit", "pyarrow", "jinja2", "rich", "numpy", "torch")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["status", "--help"], ["merge", "--help"], ["submit", "--help"], []]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """`hpcresume --help` answers without Ray, submitit and the like; so does the bare import."""
    code = (
        "import json, sys\n"
        "arguments = json.loads(sys.argv[1])\n"
        "import hpcresume\n"
        "if arguments:\n"
        "    from hpcresume.cli import main\n"
        "    sys.argv = ['hpcresume', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    result = run_child(code, json.dumps(arguments))
    assert 0 == result.returncode, result.stderr
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert set() == loaded & set(HEAVY)
