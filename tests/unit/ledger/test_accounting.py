"""Order-free accounting: each way in which a counter would complete a source too early."""

from __future__ import annotations

import itertools

import pytest

from hpcresume.ids import ROOT, ItemPath
from hpcresume.ledger.accounting import Accounting, Ack, Verdict

S = 7
OPEN, COMPLETE, FAILED = Verdict.OPEN, Verdict.COMPLETE, Verdict.FAILED


def p(*steps: int) -> ItemPath:
    return ItemPath(steps)


def ack(item: ItemPath, *emitted: ItemPath, attempt: int = 1, source: int = S) -> Ack:
    return Ack(source, attempt, item, emitted)


def fail(item: ItemPath, attempt: int = 1) -> Ack:
    return Ack(S, attempt, item, failed=True)


@pytest.fixture
def accounting() -> Accounting:
    return Accounting()


def deliver(accounting: Accounting, *events: Ack | str) -> list[Verdict]:
    return [
        accounting.admit(S, 1) if isinstance(event, str) else accounting.acknowledge(event)
        for event in events
    ]


# -- what a source goes through ---------------------------------------------------------------


def test_one_in_one_out(accounting: Accounting) -> None:
    """A source whose only item is consumed is complete, and forgotten."""
    assert [OPEN, OPEN, COMPLETE] == deliver(accounting, "admit", ack(ROOT, p(0)), ack(p(0)))
    assert 0 == len(accounting)


def test_a_single_stage(accounting: Accounting) -> None:
    """A pipeline of one stage: source and last stage in one acknowledgement."""
    assert [OPEN, COMPLETE] == deliver(accounting, "admit", ack(ROOT))


def test_fan_out(accounting: Accounting) -> None:
    """Ten children: the tenth consumed completes the source, not the first."""
    children = [p(n) for n in range(10)]
    verdicts = deliver(accounting, "admit", ack(ROOT, *children), *map(ack, children))
    assert [OPEN] * 11 + [COMPLETE] == verdicts


def test_a_dropped_source(accounting: Accounting) -> None:
    """A filter that drops the source's only item completes it: None is not a failure."""
    assert [OPEN, OPEN, COMPLETE] == deliver(accounting, "admit", ack(ROOT, p(0)), ack(p(0)))


def test_empty_output_completes(accounting: Accounting) -> None:
    """A stage that gives an empty list of items has consumed its input."""
    assert [OPEN, COMPLETE] == deliver(accounting, "admit", ack(ROOT))


def test_fan_out_then_filter_all(accounting: Accounting) -> None:
    """All children dropped by the next stage: complete with the last one."""
    verdicts = deliver(accounting, "admit", ack(ROOT, p(0), p(1)), ack(p(0)), ack(p(1)))
    assert [OPEN, OPEN, OPEN, COMPLETE] == verdicts


def test_fan_out_twice(accounting: Accounting) -> None:
    """Children fan out themselves; every grandchild counts."""
    grandchildren = [p(a, b) for a in range(2) for b in range(3)]
    events = ["admit", ack(ROOT, p(0), p(1)), ack(p(0), *grandchildren[:3])]
    events += [ack(p(1), *grandchildren[3:]), *map(ack, grandchildren)]
    verdicts = deliver(accounting, *events)
    assert [OPEN] * 9 + [COMPLETE] == verdicts


def test_items_of_a_fused_stage_may_skip_a_level(accounting: Accounting) -> None:
    """Stages that run as one acknowledge once, with paths deeper by their number."""
    verdicts = deliver(accounting, "admit", ack(ROOT, p(0, 1), p(2, 0)), ack(p(0, 1)), ack(p(2, 0)))
    assert [OPEN, OPEN, OPEN, COMPLETE] == verdicts


def test_failure_after_fan_out(accounting: Accounting) -> None:
    """One failed child keeps the source pending, whatever its siblings do before or after."""
    verdicts = deliver(
        accounting, "admit", ack(ROOT, p(0), p(1), p(2)), ack(p(0)), fail(p(1)), ack(p(2))
    )
    assert [OPEN, OPEN, OPEN, FAILED, FAILED] == verdicts
    assert S in accounting


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_failure_is_never_outrun(accounting: Accounting, order: tuple[int, ...]) -> None:
    """In every order of deliveries, a try with a failure does not complete."""
    events = [ack(ROOT, p(0), p(1)), ack(p(0)), fail(p(1))]
    accounting.admit(S, 1)
    verdicts = [accounting.acknowledge(events[i]) for i in order]
    assert COMPLETE not in verdicts
    assert S in accounting


# -- holes of a bare counter ------------------------------------------------------------------


def test_a_zero_that_comes_first_completes_nothing(accounting: Accounting) -> None:
    """Acknowledgements before the root was seen leave the source open (zero first)."""
    assert [OPEN] == deliver(accounting, ack(p(0)))
    assert [OPEN] == deliver(accounting, ack(ROOT, p(0)))
    assert [COMPLETE] == deliver(accounting, "admit")


def test_a_drop_that_overtakes_its_fan_out(accounting: Accounting) -> None:
    """A child's drop recorded before its parent's fan-out never completes the source early."""
    assert [OPEN, OPEN] == deliver(accounting, "admit", ack(p(0)))
    assert [OPEN] == deliver(accounting, ack(ROOT, *[p(n) for n in range(10)]))
    assert [OPEN] * 8 + [COMPLETE] == deliver(accounting, *[ack(p(n)) for n in range(1, 10)])


def test_a_lost_fan_out_leaves_the_source_open(accounting: Accounting) -> None:
    """Children consumed without a record of their emission complete nothing."""
    deliver(accounting, "admit", *[ack(p(n)) for n in range(10)])
    assert S in accounting


def test_a_lost_drop_leaves_the_source_open(accounting: Accounting) -> None:
    """A child that was emitted and never acknowledged keeps the source pending."""
    assert COMPLETE not in deliver(accounting, "admit", ack(ROOT, p(0), p(1)), ack(p(1)))
    assert S in accounting


def test_equal_numbers_are_not_equal_sets(accounting: Accounting) -> None:
    """
    As many items consumed as emitted is no proof: A -> [] and B -> [b1, b2] look like two
    in, two out; here one of the consumed items is another than the emitted one.
    """
    assert [OPEN, OPEN, OPEN] == deliver(accounting, "admit", ack(ROOT, p(0), p(1)), ack(p(0)))
    assert [OPEN] == deliver(accounting, ack(p(0, 5)))


def test_sources_of_one_batch_do_not_mix(accounting: Accounting) -> None:
    """In a batch mixed from two sources each is charged with its own items only."""
    accounting.admit(1, 1)
    accounting.admit(2, 1)
    accounting.acknowledge(ack(ROOT, source=1))
    assert 1 not in accounting

    assert OPEN is accounting.acknowledge(ack(ROOT, p(0), p(1), source=2))
    assert OPEN is accounting.acknowledge(ack(p(1), source=2))
    assert 2 in accounting
    assert COMPLETE is accounting.acknowledge(ack(p(0), source=2))


def test_a_repeated_delivery_changes_nothing(accounting: Accounting) -> None:
    """The same acknowledgement again is told apart and does not count twice."""
    deliver(accounting, "admit", ack(ROOT, p(0), p(1)), ack(p(0)))
    assert [Verdict.REPEATED, Verdict.REPEATED] == deliver(
        accounting, ack(p(0)), ack(ROOT, p(0), p(1))
    )
    assert S in accounting
    assert [COMPLETE] == deliver(accounting, ack(p(1)))
    assert [] == accounting.anomalies


def test_a_delivery_after_completion_changes_nothing(accounting: Accounting) -> None:
    """Late copies of everything, the admission included, neither complete again nor reopen."""
    events = ["admit", ack(ROOT, p(0)), ack(p(0))]
    assert COMPLETE is deliver(accounting, *events)[-1]

    assert [Verdict.STALE] * 3 == deliver(accounting, *events)
    assert 0 == len(accounting)


def test_an_admission_that_is_repeated(accounting: Accounting) -> None:
    """Admitting the same try twice is admitting it once."""
    assert [OPEN, OPEN, OPEN, COMPLETE] == deliver(
        accounting, "admit", "admit", ack(ROOT, p(0)), ack(p(0))
    )


# -- anomalies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "emitted",
    [(p(1, 0),), (ROOT,), (p(0),), (p(0, 1), p(0, 1))],
    ids=["another's child", "its parent", "itself", "one item twice"],
)
def test_impossible_emissions_are_anomalies(
    accounting: Accounting, emitted: tuple[ItemPath, ...]
) -> None:
    """What does not descend from the item, or comes twice, is reported and never completes."""
    deliver(accounting, "admit", ack(ROOT, p(0)))

    assert [Verdict.ANOMALY] == deliver(accounting, ack(p(0), *emitted))
    assert COMPLETE not in deliver(accounting, ack(p(0)), *[ack(path) for path in emitted])
    assert S in accounting
    assert (p(0), emitted) == (accounting.anomalies[0][0].item, accounting.anomalies[0][0].emitted)


def test_one_item_from_two_parents_is_an_anomaly(accounting: Accounting) -> None:
    """The same item emitted by two different items would be consumed once for both."""
    deliver(accounting, "admit", ack(ROOT, p(0), p(0, 0)))
    assert [Verdict.ANOMALY] == deliver(accounting, ack(p(0), p(0, 0)))


def test_a_second_acknowledgement_that_differs(accounting: Accounting) -> None:
    """An item that emitted one thing and then another: the try fails, and it is reported."""
    deliver(accounting, "admit", ack(ROOT, p(0)))
    assert [Verdict.ANOMALY] == deliver(accounting, ack(ROOT, p(0), p(1)))
    assert COMPLETE not in deliver(accounting, ack(p(0)), ack(p(1)))
    (reported, why) = accounting.anomalies[0]
    assert (ROOT, (p(0), p(1))) == (reported.item, reported.emitted)
    assert "acknowledged before" in why


def test_an_anomaly_is_cured_by_the_next_try(accounting: Accounting) -> None:
    """After an anomaly the source is owed; its next try completes it."""
    deliver(accounting, "admit", ack(ROOT, p(0)), ack(ROOT))
    accounting.admit(S, 2)
    assert COMPLETE is accounting.acknowledge(ack(ROOT, attempt=2))


# -- tries ------------------------------------------------------------------------------------


def test_a_retry_replaces_the_children(accounting: Accounting) -> None:
    """The second try emits other children; those of the first are owed no longer."""
    deliver(accounting, "admit", ack(ROOT, *[p(n) for n in range(5)]), fail(p(3)))

    assert OPEN is accounting.admit(S, 2)
    assert 2 == accounting.attempt(S)
    assert OPEN is accounting.acknowledge(ack(ROOT, p(0), attempt=2))
    assert COMPLETE is accounting.acknowledge(ack(p(0), attempt=2))


def test_late_acknowledgements_of_an_old_try(accounting: Accounting) -> None:
    """Whatever the first try still delivers, a failure too, does not touch the second."""
    deliver(accounting, "admit", ack(ROOT, p(0), p(1)), fail(p(0)))
    accounting.admit(S, 2)
    accounting.acknowledge(ack(ROOT, p(0), attempt=2))

    assert [Verdict.STALE] * 3 == deliver(accounting, ack(p(1)), fail(p(1)), "admit")
    assert COMPLETE is accounting.acknowledge(ack(p(0), attempt=2))


def test_a_new_try_may_be_heard_of_before_it_is_admitted(accounting: Accounting) -> None:
    """An acknowledgement of the second try that overtakes its admission counts after it."""
    deliver(accounting, "admit", fail(ROOT))
    assert OPEN is accounting.acknowledge(ack(ROOT, attempt=2))
    assert COMPLETE is accounting.admit(S, 2)


def test_a_forgotten_source_stays_forgotten(accounting: Accounting) -> None:
    """Late deliveries do not bring back a source that was given up."""
    deliver(accounting, "admit", ack(ROOT, p(0), p(1)), fail(p(0)))
    accounting.forget(S)

    assert [Verdict.STALE] == deliver(accounting, ack(p(1)))
    assert S not in accounting
    assert 0 == len(accounting)


def test_a_forgotten_source_can_be_admitted_anew(accounting: Accounting) -> None:
    """Giving up is undone by an admission, and by nothing else."""
    deliver(accounting, "admit", fail(ROOT))
    accounting.forget(S)
    accounting.admit(S, 2)
    assert COMPLETE is accounting.acknowledge(ack(ROOT, attempt=2))


def test_memory_is_bounded_by_what_is_in_flight(accounting: Accounting) -> None:
    """After ten thousand sources nothing is pending."""
    for source in range(10_000):
        accounting.admit(source, 1)
        assert COMPLETE is accounting.acknowledge(ack(ROOT, source=source))
    assert 0 == len(accounting)
