"""Accounting against a model that knows the whole tree and every delivery."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from hpcresume.ids import ROOT, ItemPath, child
from hpcresume.ledger.accounting import Accounting, Ack, Verdict

SOURCE = 3


@dataclass
class Tree:
    """Items of one source in one try: what each one emits."""

    emits: dict[ItemPath, tuple[ItemPath, ...]] = field(default_factory=dict)

    def events(self, attempt: int) -> list[Ack | int]:
        """Return every delivery: the admission (as its number) and one for each item."""
        return [attempt, *(Ack(SOURCE, attempt, item, out) for item, out in self.emits.items())]


@st.composite
def trees(draw, *, max_depth: int = 4) -> Tree:
    tree = Tree()

    def grow(item: ItemPath, depth: int) -> None:
        width = draw(st.integers(0, 3)) if depth < max_depth else 0
        tree.emits[item] = tuple(child(item, n) for n in range(width))
        for path in tree.emits[item]:
            grow(path, depth + 1)

    grow(ROOT, 0)
    return tree


@dataclass
class Model:
    """Completes when it has heard of every item of a tree it knows: no sets, no counters."""

    tree: Tree
    heard: set[ItemPath | None] = field(default_factory=set)

    def deliver(self, event: Ack | int) -> bool:
        """Take in a delivery and tell whether it was the last one missing."""
        before = self._is_complete()
        self.heard.add(None if isinstance(event, int) else event.item)
        return self._is_complete() and not before

    def _is_complete(self) -> bool:
        return None in self.heard and all(item in self.heard for item in self.tree.emits)


def deliver(accounting: Accounting, event: Ack | int) -> Verdict:
    if isinstance(event, int):
        return accounting.admit(SOURCE, event)
    return accounting.acknowledge(event)


@settings(max_examples=300)
@given(trees(), st.data())
def test_completion_is_the_last_delivery_in_any_order(tree: Tree, data: st.DataObject) -> None:
    """
    Without loss, permuted and duplicated as it may be: complete exactly once, at the delivery
    that was the last one missing.
    """
    events = tree.events(1)
    extra = data.draw(st.lists(st.sampled_from(events), max_size=6))
    order = data.draw(st.permutations(events + extra))
    accounting, model = Accounting(), Model(tree)

    for event in order:
        expected = model.deliver(event)
        assert expected == (deliver(accounting, event) is Verdict.COMPLETE)

    assert 0 == len(accounting)
    assert [] == accounting.anomalies


@settings(max_examples=300)
@given(trees(), st.data())
def test_a_lost_delivery_keeps_the_source_open(tree: Tree, data: st.DataObject) -> None:
    """With any delivery lost, whatever else comes as often as it likes: never complete."""
    events = tree.events(1)
    lost = data.draw(st.sampled_from(events))
    kept = [event for event in events if event is not lost]
    if not kept:
        return
    extra = data.draw(st.lists(st.sampled_from(kept), max_size=4))
    order = data.draw(st.permutations(kept + extra))
    accounting = Accounting()

    assert all(deliver(accounting, event) is not Verdict.COMPLETE for event in order)
    assert SOURCE in accounting


@settings(max_examples=300)
@given(trees(), st.data())
def test_a_failed_item_keeps_the_source_open(tree: Tree, data: st.DataObject) -> None:
    """With any item failed instead of consumed, in any order: never complete in this try."""
    failed = data.draw(st.sampled_from(list(tree.emits)))
    events = [
        Ack(SOURCE, 1, event.item, failed=True)
        if isinstance(event, Ack) and event.item == failed
        else event
        for event in tree.events(1)
    ]
    accounting = Accounting()
    verdicts = [deliver(accounting, e) for e in data.draw(st.permutations(events))]

    assert Verdict.COMPLETE not in verdicts
    assert SOURCE in accounting


@settings(max_examples=300)
@given(trees(), trees(), st.data())
def test_a_retry_counts_alone(first: Tree, second: Tree, data: st.DataObject) -> None:
    """
    Two tries with different children, delivered in any mixture after the first try failed:
    complete exactly once, by the second try's last delivery, once it was heard of.
    """
    late = data.draw(st.lists(st.sampled_from(first.events(1)), max_size=6))
    order = data.draw(st.permutations([*late, *second.events(2)]))
    accounting, model = Accounting(), Model(second)
    accounting.admit(SOURCE, 1)
    accounting.acknowledge(Ack(SOURCE, 1, ROOT, failed=True))

    for event in order:
        attempt = event if isinstance(event, int) else event.attempt
        expected = attempt == 2 and model.deliver(event)
        assert expected == (deliver(accounting, event) is Verdict.COMPLETE)

    assert 0 == len(accounting)


@settings(max_examples=200)
@given(st.lists(trees(max_depth=2), min_size=1, max_size=4), st.data())
def test_sources_do_not_affect_each_other(all_trees: list[Tree], data: st.DataObject) -> None:
    """Deliveries of several sources, interleaved: each completes at its own last one."""
    events = [(number, event) for number, tree in enumerate(all_trees) for event in tree.events(1)]
    accounting = Accounting()
    models = [Model(tree) for tree in all_trees]
    for number, event in data.draw(st.permutations(events)):
        expected = models[number].deliver(event)
        if isinstance(event, int):
            verdict = accounting.admit(number, event)
        else:
            verdict = accounting.acknowledge(Ack(number, 1, event.item, event.emitted))
        assert expected == (verdict is Verdict.COMPLETE)
    assert 0 == len(accounting)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whole_calls_count_as_their_items(data: st.DataObject) -> None:
    """
    Calls of several sources, recorded at once where that is possible, mixed with single
    deliveries, repetitions, failures and second tries, give the verdicts of single deliveries.
    """
    bulk, single = Accounting(), Accounting()
    sources = range(6)
    for _ in range(data.draw(st.integers(1, 15))):
        group = data.draw(st.lists(st.sampled_from(sources), min_size=1, max_size=4))
        item = ItemPath((0,) * data.draw(st.integers(0, 2)))
        kind = data.draw(st.sampled_from(["admit", "advance", "end", "fan", "fail", "again"]))
        one_by_one(single, kind, group, item)
        if not at_once(bulk, kind, group, item):
            one_by_one(bulk, kind, group, item)
        assert [s in single for s in sources] == [s in bulk for s in sources]
        assert len(single) == len(bulk)
    assert single._completed == bulk._completed
    pending = [source for source in sources if source in single]
    assert [single.attempt(s) for s in pending] == [bulk.attempt(s) for s in pending]


def one_by_one(accounting: Accounting, kind: str, group: list[int], item: ItemPath) -> None:
    """Deliver for each source of a call by itself."""
    emitted = {"fan": (child(item, 0), child(item, 1)), "advance": (child(item, 0),)}.get(kind, ())
    for source in group:
        if kind in ("admit", "again"):
            accounting.admit(source, 2 if kind == "again" else 1)
        else:
            accounting.acknowledge(Ack(source, 1, item, emitted, failed=kind == "fail"))


def at_once(accounting: Accounting, kind: str, group: list[int], item: ItemPath) -> bool:
    """Deliver for a call, where its kind and its sources allow it."""
    sources = BitMap(group)
    if len(sources) < len(group):
        return False
    if kind == "admit":
        return accounting.admit_all(sources)
    if kind in ("advance", "end"):
        return accounting.advance_all(sources, item, child(item, 0) if kind == "advance" else None)
    return False
