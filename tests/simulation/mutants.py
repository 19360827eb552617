"""Mistakes that the simulation has to find: each changes a line or two of the shipped code.

A mutant is a piece of source text and what stands there instead.  It is applied by compiling
the changed module and giving each of its functions the new code, so every place that has
imported a function runs the mutant.  A text that is not found exactly once is an error: the
code has changed, and the mutant has to follow it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: What is done wrong.
        module: Where.
        old: The text that it replaces.
        new: What stands there instead.
        seeds: How many seeds may be needed to find it.
        first: The seed to begin with: one that has found it, where many before it do not.
    """

    name: str
    module: str
    old: str
    new: str
    seeds: int = 1500
    first: int = 0


class StaleMutantError(Exception):
    """The text that a mutant replaces is not in the code any more."""


def mutated_source(mutant: Mutant) -> str:
    """Return the module's source with the mistake in it.

    Raises:
        StaleMutantError: The text to be replaced does not occur exactly once.
    """
    source = inspect.getsource(importlib.import_module(mutant.module))
    count = source.count(mutant.old)
    if count != 1:
        raise StaleMutantError(
            f"mutant {mutant.name!r}: its text occurs {count} times in {mutant.module}, not once. "
            "The code has changed; change the mutant with it."
        )
    return source.replace(mutant.old, mutant.new)


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Let the shipped code make the mistake."""
    module = importlib.import_module(mutant.module)
    changed = types.ModuleType(module.__name__)
    changed.__file__ = module.__file__
    code = compile(mutated_source(mutant), str(module.__file__), "exec", dont_inherit=True)
    exec(code, changed.__dict__)
    functions, mistaken = functions_of(module), functions_of(changed)
    kept = {name: function.__code__ for name, function in functions.items()}
    differs = [n for n, f in functions.items() if not _same(f.__code__, mistaken[n].__code__)]
    assert differs, f"mutant {mutant.name!r} changes no function"
    try:
        for name in differs:
            functions[name].__code__ = mistaken[name].__code__
        yield
    finally:
        for name in differs:
            functions[name].__code__ = kept[name]


def _same(one: types.CodeType, other: types.CodeType) -> bool:
    def constants(code: types.CodeType) -> list[Any]:
        return [c for c in code.co_consts if not isinstance(c, types.CodeType)]

    inner = [c for c in one.co_consts if isinstance(c, types.CodeType)]
    others = [c for c in other.co_consts if isinstance(c, types.CodeType)]
    return (
        one.co_code == other.co_code
        and one.co_names == other.co_names
        and constants(one) == constants(other)
        and len(inner) == len(others)
        and all(_same(a, b) for a, b in zip(inner, others, strict=True))
    )


def functions_of(module: types.ModuleType) -> dict[str, types.FunctionType]:
    """Return the functions and methods that a module defines, by their dotted names."""
    found: dict[str, types.FunctionType] = {}

    def visit(prefix: str, names: dict[str, Any]) -> None:
        for name, value in names.items():
            if isinstance(value, type) and value.__module__ == module.__name__ and not prefix:
                visit(f"{name}.", dict(vars(value)))
            elif isinstance(value, property):
                visit(f"{prefix}{name}.", {"fget": value.fget})
            else:
                inner = getattr(value, "__func__", value)
                function = inspect.unwrap(inner) if callable(inner) else inner
                mine = getattr(function, "__module__", None) == module.__name__
                if isinstance(function, types.FunctionType) and mine:
                    found[f"{prefix}{name}"] = function

    visit("", dict(vars(module)))
    return found


_FS, _STORE = "hpcresume.fs", "hpcresume.ledger.store"
_PUBLISHING, _ACCOUNTING = "hpcresume.ledger.publishing", "hpcresume.ledger.accounting"
_PUBLISHER, _RECOVERY = "hpcresume.task.publisher", "hpcresume.task.recovery"
_DIRECTORY, _CONTAINER = "hpcresume.run.directory", "hpcresume.segment.container"
_GENERATION, _PLAN = "hpcresume.merge.generation", "hpcresume.merge.plan"
_PACKS, _RETENTION, _ROWS = (
    "hpcresume.merge.packs",
    "hpcresume.merge.retention",
    "hpcresume.output.rows",
)
_ROUNDS, _DRIVE, _SHARD = (
    "hpcresume.launch.rounds",
    "hpcresume.launch.drive",
    "hpcresume.task.shard",
)

PUBLISH = [
    Mutant("no read-back before the receipt", _FS,
           "        found = digest_of(fs, path)\n", "        found = digest\n", first=638),
    Mutant("no fsync of the file", _FS,
           "            handle.sync()\n            failpoint", "            failpoint"),
    Mutant("no fsync of the directory", _FS,
           "            fs.sync_directory(directory)\n", "            pass\n", first=142),
    Mutant("one file for all segments", _PUBLISHING,
           'name = f"seg-{seq:06d}-{secrets.token_hex(8)}"', 'name = "seg-000001-" + "0" * 16'),
    Mutant("a receipt despite an error", _PUBLISHER,
           "            return Refused(str(error))\n",
           "            return Receipt(1 << 40, 1, 0, False)\n"),
    Mutant("zombies share an epoch", _DIRECTORY,
           "                    epoch += 1\n                    continue\n",
           "                    pass\n", first=512),
    Mutant("a receipt for one commit too many", _PUBLISHING,
           "            covered = sequence\n", "            covered = sequence + 1\n"),
    Mutant("failures are not published", _PUBLISHING,
           "            failures.extend(commit.failures)\n", "            pass\n"),
    Mutant("a dead attempt is swept unpublished", _RECOVERY,
           '    if not os.path.exists(os.path.join(path, "data.mdb")):\n', "    if True:\n"),
    Mutant("a dead attempt's damaged ledger is opened", _STORE,
           "        if problems:\n", "        if False:\n", first=329),
]  # fmt: skip
LEDGER = [
    Mutant("one commit too many is released", _STORE,
           "cursor.key()) <= last:\n", "cursor.key()) <= last + 1:\n"),
    Mutant("released numbers are given out again", _STORE,
           "else self._released(txn)\n        if batch.durable:\n",
           "else 0\n        if batch.durable:\n"),
    Mutant("the first pending commit is skipped", _STORE,
           "cursor.set_range(_KEY.pack(after + 1))", "cursor.set_range(_KEY.pack(after + 2))"),
    Mutant("results are not synced", _STORE,
           "        if batch.durable:\n            self._sync()\n", "", seeds=6000),
    Mutant("a counter in place of sets", _ACCOUNTING,
           "self.emitted == self.consumed.keys()",
           "len(self.emitted) == len(self.consumed)"),
    Mutant("a retry does not replace the try before", _ACCOUNTING,
           "if pending is None or attempt > pending.attempt:", "if pending is None:"),
]  # fmt: skip
MERGE = [
    Mutant("no digest of the footer", _CONTAINER,
           "    if hashlib.sha256(data).digest() != digest:\n", "    if False:\n", seeds=6000),
    Mutant("merge forgets the generation before", _GENERATION,
           "            union, packs = load_newest(run), Packs(run)\n",
           "            union, packs = Union(number=load_newest(run).number), Packs(run)\n"),
    Mutant("a source has several winners", _GENERATION,
           "won = segment.completed - self.completed", "won = segment.completed.copy()"),
    Mutant("the last writer wins", _GENERATION,
           "for key in sorted(names, key=lambda key: (key[0], names[key].seq, key[1]))",
           "for key in sorted(names, key=lambda key: key[0], reverse=True)"),
    Mutant("a charge counts twice", _GENERATION,
           "if known is not None and charge in known.charged:", "if False:"),
    Mutant("one try more than allowed", _GENERATION,
           "attempts >= max_attempts", "attempts > max_attempts"),
    Mutant("retry=False is ignored", _GENERATION, "given_up = not failure.retry or (attempts",
           "given_up = (attempts"),
    Mutant("failures of completed sources stay", _GENERATION,
           "for index in [index for index in self.failures if index in won]:",
           "for index in []:"),
    Mutant("a damaged generation's number is used again", _GENERATION,
           "number = max(union.number, union.passed_over) + 1", "number = union.number + 1",
           seeds=6000),
    Mutant("a segment taken back keeps its sources", _GENERATION,
           "    union.completed -= lost\n", "", seeds=6000),
    Mutant("what was taken back comes back unread", _GENERATION,
           "        if relative in union.bad:\n", "        if False:\n", seeds=6000),
]  # fmt: skip
ROUND = [
    Mutant("the last source of a shard is not dealt", _PLAN,
           "[sources[start:end] for", "[sources[start : max(start + 1, end - 1)] for"),
    Mutant("a shard forgets its failed tries", _PLAN,
           "{index: attempts[index] for index in charged & sources}", "{}"),
    Mutant("a shard forgets its suspects", _PLAN,
           "(found := group & sources)]", "(found := group & sources) and False]"),
    Mutant("quarantined sources are dealt again", _ROUNDS,
           "left = owed - union.settled()", "left = owed - union.completed"),
    Mutant("cancelled tasks come back", _ROUNDS,
           "return Standing(union, left - union.withheld, len(owed))",
           "return Standing(union, left, len(owed))", seeds=6000),
    Mutant("every array owns the round", _DIRECTORY,
           "                return self.fs.read(path).decode()\n        return owner",
           "                return owner\n        return owner"),
    Mutant("a stop mark is overlooked", _DIRECTORY,
           'return self._newest_mark()[1] == "stop"', "return False", seeds=6000),
    Mutant("an attempt repeats its task's work", _SHARD,
           "shard.bitmap() - union.settled()", "shard.bitmap()"),
    Mutant("an attempt forgets the rounds before", _SHARD,
           "attempts = dict(shard.attempts)", "attempts = dict[int, int]()"),
]  # fmt: skip
RETENTION = [
    Mutant("removes without reading the pack back", _RETENTION,
           "        packs.segment(key, number).verify()\n", "        pass\n", first=1717),
    Mutant("attempts do not ask what was removed", _SHARD,
           "    if left and run.has_removals():\n", "    if False:\n", first=1614),
    Mutant("removes what no pack holds", _RETENTION,
           "        if key_of(name) in union.pack_of\n", "        if key_of(name) in union.won\n"),
    Mutant("folds without verifying the body", _RETENTION,
           "        segment.verify()\n", "", seeds=6000),
    Mutant("a pack's segments are shifted by one", _PACKS,
           "{key: block for block, key in enumerate(footer.segments)}",
           "{key: max(0, block - 1) for block, key in enumerate(footer.segments)}"),
    Mutant("a merge overlooks packs that no generation knows", _GENERATION,
           "        if number <= union.packs:\n", "        if True:\n", seeds=6000),
]  # fmt: skip
MUTANTS = [*PUBLISH, *LEDGER, *MERGE, *ROUND, *RETENTION]
