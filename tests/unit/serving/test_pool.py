"""The pool and its updates, with members in threads of this process."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpcresume.errors import ConfigError, PoolUnrecoverable
from hpcresume.serving import (
    FileTransport,
    PhaseFailedError,
    Retryable,
    ServingError,
    ServingPool,
    StateError,
    StateExporter,
    StatefulWorker,
    UpdateInProgress,
    UpdatePolicy,
    UpdateReport,
    UpdatesEndedError,
)
from hpcresume.serving.members import LocalPlaces
from hpcresume.serving.policy import Outcome, Phase, WorkerState
from hpcresume.serving.transport import ObjectTransport
from hpcresume.updates import Journal, UpdateStep
from tests.support.serving import (
    QUICK,
    BoomError,
    Faulty,
    InPlace,
    Keeper,
    eventually,
    pool_of,
    run,
)

HANG_S = 2.0
"""After so long a phase that was told to hang counts as hanging; the others take far less."""


def test_events_of_an_update(tmp_path: Path) -> None:
    """An update pauses, releases, prepares, builds, pushes, commits, cleans up and resumes."""

    async def case() -> list[str]:
        async with pool_of(tmp_path, n=1) as case:
            report = await case.pool.update(2)
            assert Outcome.COMMITTED is report.outcome
            assert {2} == await case.check_contract()
            return case.faults.events()

    events = run(case())

    # Both are prepared at once.
    assert {"exporter.prepare", "worker.prepare"} == set(events[2:4])
    assert [
        *("worker.pause", "worker.release"),
        *events[2:4],
        *("exporter.export", "worker.stage", "worker.commit"),
        *("exporter.finalize", "worker.finalize", "worker.restore", "worker.resume"),
    ] == events


def test_a_failing_build_restores_service(tmp_path: Path) -> None:
    """
    The state cannot be built: exporter and workers are finalized, caches restored, workers
    resumed with the old version, in this order, and the build's own exception is raised.
    """

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("exporter", "export", "raise")
            error = await case.try_update(2)
            events = case.faults.events()
            assert isinstance(error, BoomError)
            assert {1} == await case.check_contract()
            assert [
                *("exporter.export", "exporter.finalize", "worker.finalize"),
                *("worker.restore", "worker.resume"),
            ] == events[events.index("exporter.export") :]
            assert Outcome.ROLLED_BACK is error.update_report.outcome

    run(case())


def test_a_failing_push_restores_service(tmp_path: Path) -> None:
    """One worker cannot receive the state: all serve the old one, the staged is dropped."""

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("worker", "stage", "raise")
            error = await case.try_update(2)
            assert isinstance(error, BoomError)
            assert {1} == await case.check_contract()
            assert [WorkerState.SERVING] * 3 == list(case.pool.state().workers.values())
            assert "worker.commit" not in case.faults.events()
            members = [seat.member for seat in case.pool._seats.values()]
            assert [None] * 3 == [m.host.worker._staged for m in members]

    run(case())


def test_a_failing_finalize_alone_is_raised_after_service_is_restored(tmp_path: Path) -> None:
    """A clean-up that fails after success is raised, and the new version is served."""

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("exporter", "finalize", "raise")
            error = await case.try_update(2)
            assert isinstance(error, BoomError)
            assert Outcome.COMMITTED is error.update_report.outcome
            assert {2} == await case.check_contract()
            assert "worker.resume" == case.faults.events()[-1]

    run(case())


def test_the_first_failure_wins_over_those_of_the_clean_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Push, finalize and restore all fail: the push's exception is raised as the same
    object with the others as notes and in its report; each was tried, labelled and logged
    with its traceback.
    """

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("worker", "stage", "raise", only_one=False)
            case.faults.arm("worker", "finalize", "raise", only_one=False)
            case.faults.arm("exporter", "finalize", "raise")
            error = await case.try_update(2)
            assert isinstance(error, BoomError)
            report = error.update_report
            assert report.primary is error
            assert "worker in stage" == str(error)
            labels = {one.label for one in report.cleanup}
            workers = {f"finalize of worker-{i}" for i in range(3)}
            assert {"finalize of exporter", *workers} == labels
            assert all(any(label in note for note in error.__notes__) for label in labels)
            assert {1} == await case.check_contract()
            assert {"worker.restore", "worker.resume"} <= set(case.faults.events())

    with caplog.at_level(logging.WARNING):
        run(case())
    traces = [r for r in caplog.records if r.exc_info and "finalize failed" in r.getMessage()]
    assert 4 == len(traces)


def test_several_clean_up_failures_are_a_group(tmp_path: Path) -> None:
    """What fails on all workers after success is one ExceptionGroup, service is up."""

    async def case() -> None:
        async with pool_of(tmp_path, n=2) as case:
            case.faults.arm("worker", "finalize", "raise", only_one=False)
            error = await case.try_update(2)
            assert isinstance(error, ExceptionGroup)
            assert ["worker in finalize"] * 2 == [str(one) for one in error.exceptions]
            assert {2} == await case.check_contract()

    run(case())


def test_a_straggler_never_commits(tmp_path: Path) -> None:
    """
    One worker's push raises while another's hangs: the hanging one is fenced before the
    error is out, and when it wakes up it takes no request and holds nothing.
    """

    async def case() -> None:
        async with pool_of(tmp_path, policy=replace(QUICK, replace_dead=False)) as case:
            case.pool.policy = replace(case.pool.policy, transfer_s=HANG_S)
            case.faults.arm("worker", "stage", "hang")
            stuck = [seat.member for seat in case.pool._seats.values()]
            error = await case.try_update(2)
            assert isinstance(error, PhaseFailedError)
            assert {1} == await case.check_contract()
            fenced = list(error.update_report.fenced)
            case.faults.disarm()
            host = stuck[int(fenced[0][-1])].host
            await eventually(lambda: host.worker._staged is not None, "the straggler wakes up")
            assert (False, None) == (host.health().is_open, host.health().held)
            with pytest.raises(ServingError, match="is over"):
                host.commit(10**6, 2)
            assert 2 == len(case.pool.state().serving)

    run(case())


def test_a_torn_push_in_place_is_never_served(tmp_path: Path) -> None:
    """
    A worker that was overwritten in part is tainted.  The push is tried again; while it
    fails the worker takes no request, and with no other left the old version is pushed.
    """

    async def case() -> None:
        policy = replace(QUICK, replace_dead=False)
        async with pool_of(tmp_path, kind=InPlace, n=2, policy=policy) as case:
            case.faults.arm("worker", "stage", "raise", once=True)
            report = await case.pool.update(2)
            assert ({2}, {}) == (await case.check_contract(), report.fenced)

            case.faults.disarm()
            case.faults.arm("worker", "stage", "raise")
            report = await case.pool.update(3)
            assert {3} == await case.check_contract()
            assert (1, True) == (len(report.fenced), report.is_degraded)

    run(case())


def test_what_was_overwritten_is_brought_back(tmp_path: Path) -> None:
    """A new version that no worker can be brought to is undone by pushing the old one whole."""

    class Picky(InPlace):
        def apply(self, version, parts):
            for part in parts:
                self.memory[part.name] = bytes(part.data)
                if version == 2:
                    raise BoomError("not this one")

    async def case() -> None:
        async with pool_of(tmp_path, kind=Picky, n=2) as case:
            error = await case.try_update(2)
            assert isinstance(error, BoomError)
            assert Outcome.ROLLED_BACK is error.update_report.outcome
            assert {1} == await case.check_contract()
            assert 2 == len(case.pool.state().serving)
            await case.pool.update(3)
            assert {3} == await case.check_contract()

    run(case())


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    """A part that does not arrive as it was sent is never staged, and the error names it."""

    class Torn(ObjectTransport):
        def chunk(self, package, number):
            chunks = super().chunk(package, number)
            if package.manifest.version == 2:
                return tuple(memoryview(bytes(c.view)[:-1] + b"!") for c in chunks)
            return chunks

    async def case() -> None:
        async with pool_of(tmp_path, transport=Torn(), n=2) as case:
            error = await case.try_update(2)
            assert isinstance(error, StateError)
            assert "version 2" in str(error)
            assert "'a' fails its checksum" in str(error)
            assert {1} == await case.check_contract()

    run(case())


def test_states_travel_through_files(tmp_path: Path) -> None:
    """
    Files of the version that is served stay for workers that are replaced; those of older
    versions, of updates that failed, and all of them at the end, are removed.
    """
    directory = tmp_path / "states"

    async def case() -> None:
        transport = FileTransport(str(directory))
        async with pool_of(tmp_path, n=2, transport=transport) as case:
            await case.pool.update(2)
            case.faults.arm("worker", "stage", "raise")
            assert isinstance(await case.try_update(3), BoomError)
            case.faults.disarm()
            assert 1 == len(os.listdir(directory))
            await case.pool._seats["worker-0"].member.kill(1)
            await eventually(lambda: len(case.pool.state().serving) == 2, "it is replaced")
            assert {2} == await case.check_contract()

    run(case())

    assert [] == os.listdir(directory)


def test_too_few_workers_are_unrecoverable(tmp_path: Path) -> None:
    """
    No worker proves that it has committed: none takes requests, parked requests are told, and
    so is everybody afterwards.
    """

    async def case() -> None:
        async with pool_of(tmp_path, n=2) as case:
            case.faults.arm("worker", "commit", "raise", only_one=False)
            error, parked = await asyncio.gather(
                case.try_update(2),
                _after_pause(case.pool),
            )
            assert isinstance(error, PoolUnrecoverable)
            assert isinstance(error.__cause__, BoomError)
            assert parked is error
            assert set() == await case.check_contract()
            state = case.pool.state()
            assert [WorkerState.DEAD] * 2 == list(state.workers.values())
            assert "version 2" in state.unrecoverable
            for attempt in (case.pool.call("look"), case.pool.update(3)):
                with pytest.raises(PoolUnrecoverable):
                    await attempt

    async def _after_pause(pool: ServingPool) -> BaseException:
        await eventually(lambda: not pool.state().serving, "the pool is paused")
        with pytest.raises(PoolUnrecoverable) as raised:
            await pool.call("look")
        return raised.value

    run(case())


@pytest.mark.parametrize(("min_serving", "serve_on"), [(1, True), (2, False)])
def test_the_loss_of_a_worker_may_be_fatal(
    tmp_path: Path, min_serving: int, serve_on: bool
) -> None:
    """A worker lost after the commit leaves a smaller pool, or none where all are needed."""

    async def case() -> None:
        policy = replace(QUICK, min_serving=min_serving)
        async with pool_of(tmp_path, n=2, policy=policy) as case:
            case.faults.arm("worker", "resume", "raise")
            error = await case.try_update(2)
            assert serve_on == isinstance(error, BoomError)
            assert (not serve_on) == isinstance(error, PoolUnrecoverable)
            assert ({2} if serve_on else set()) == await case.check_contract()

    run(case())


def test_a_cancelled_update_restores_service_first(tmp_path: Path) -> None:
    """
    An update cancelled in a hanging push ends within its grace: the hanging worker is
    fenced, the others serve the old version, and CancelledError is what comes out.
    """

    async def case() -> None:
        policy = replace(QUICK, cancel_s=HANG_S)
        async with pool_of(tmp_path, policy=policy) as case:
            case.faults.arm("worker", "stage", "hang")
            task = asyncio.ensure_future(case.pool.update(2))
            await eventually(lambda: "worker.stage" in case.faults.events(), "the push begins")
            begun = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as raised:
                await task
            assert time.monotonic() - begun < QUICK.transfer_s
            assert {1} == await case.check_contract()
            assert Outcome.ROLLED_BACK is raised.value.update_report.outcome
            assert 1 == len(raised.value.update_report.fenced)
            case.faults.disarm()
            await eventually(lambda: len(case.pool.state().serving) == 3, "a third one serves")
            await case.pool.update(2)
            assert {2} == await case.check_contract()

    run(case())


def test_a_cancelled_commit_goes_forward(tmp_path: Path) -> None:
    """Once a worker may have committed there is no way back: the new version is served."""

    async def case() -> None:
        async with pool_of(tmp_path, policy=replace(QUICK, cancel_s=HANG_S)) as case:
            case.faults.arm("worker", "commit", "slow")
            task = asyncio.ensure_future(case.pool.update(2))
            await eventually(lambda: "worker.commit" in case.faults.events(), "the commit begins")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert {2} == await case.check_contract()

    run(case())


def test_a_new_worker_takes_no_request_before_a_push(tmp_path: Path) -> None:
    """
    A worker that died is replaced; its successor holds nothing, refuses requests, and
    serves after a push of the version that the others serve.
    """

    async def case() -> None:
        async with pool_of(tmp_path, n=2) as case:
            case.faults.arm("worker", "prepare", "hang")
            seat = case.pool._seats["worker-0"]
            await seat.member.kill(1)
            await eventually(lambda: seat.state is WorkerState.STALE, "a successor is there")
            with pytest.raises(Retryable) as refused:
                await seat.member.call("request", "look", (), {})
            assert (None, False) == (refused.value.version, refused.value.begun)
            answers = [await case.pool.call("look") for _ in range(4)]
            assert {"worker-1"} == {served.worker for served in answers}
            case.faults.disarm()
            await eventually(lambda: len(case.pool.state().serving) == 2, "it serves")
            assert {1} == await case.check_contract()

    run(case())


def test_requests_over_an_update_are_all_answered(tmp_path: Path) -> None:
    """
    Requests in flight, parked and coming in during updates are all answered, each by one
    version, whole.
    """

    async def case() -> None:
        async with pool_of(tmp_path) as case:

            async def ask(number: int) -> int:
                served = await case.pool.call("work", number)
                assert (number, {served.version}) == served.value
                return served.version

            async def update() -> None:
                for version in (2, 3, 4):
                    await case.pool.update(version)

            asked = [asyncio.ensure_future(ask(i)) for i in range(60)]
            await update()
            versions = await asyncio.gather(*asked)
            assert {1, 2} <= set(versions) <= {1, 2, 3, 4}

    run(case())


def test_an_aborted_request_is_retryable(tmp_path: Path) -> None:
    """With ``pause="abort"`` a long request ends at once, and its caller may ask again."""

    async def case() -> None:
        policy = replace(QUICK, pause="abort")
        async with pool_of(tmp_path, n=1, policy=policy) as case:
            asked = asyncio.ensure_future(case.pool.call("wait_for_abort"))
            await eventually(lambda: "worker.waiting" in case.faults.events(), "it waits")
            await case.pool.update(2)
            with pytest.raises(Retryable) as raised:
                await asked
            assert (1, True) == (raised.value.version, raised.value.begun)

    run(case())


def test_a_kept_request_goes_on_with_the_new_version(tmp_path: Path) -> None:
    """
    With ``pause="keep"`` an update does not wait for a long request: it stands still and goes
    on, and its answer names the version of its begin and that of its end.
    """

    async def case() -> None:
        policy = replace(QUICK, pause="keep")
        async with pool_of(tmp_path, n=1, kind=Keeper, policy=policy) as case:
            asked = asyncio.ensure_future(case.pool.call("slow"))
            await eventually(lambda: "worker.slow" in case.faults.events(), "it runs")
            report = await case.pool.update(2)
            assert (Outcome.COMMITTED, False) == (report.outcome, asked.done())
            case.faults.let_end()
            served = await asked
            assert (1, 2) == (served.began, served.version)
            assert served.value <= {1, 2}
            later = await case.pool.call("look")
            assert (2, 2) == (later.began, later.version)

    run(case())


def test_a_kept_request_survives_a_roll_back(tmp_path: Path) -> None:
    """A request that is held over an update that fails is answered by the old version."""

    async def case() -> None:
        policy = replace(QUICK, pause="keep")
        async with pool_of(tmp_path, n=1, kind=Keeper, policy=policy) as case:
            asked = asyncio.ensure_future(case.pool.call("slow"))
            await eventually(lambda: "worker.slow" in case.faults.events(), "it runs")
            case.faults.arm("worker", "stage", "raise")
            assert isinstance(await case.try_update(2), BoomError)
            case.faults.let_end()
            served = await asked
            assert (1, 1, {1}) == (served.began, served.version, served.value)

    run(case())


def test_updates_can_be_ended(tmp_path: Path) -> None:
    """
    A pool that is to take no more updates winds up the one that hangs, answers what it had
    parked, serves on, and refuses the next update.
    """

    async def case() -> None:
        async with pool_of(tmp_path, n=2, policy=replace(QUICK, cancel_s=HANG_S)) as case:
            case.faults.arm("worker", "stage", "hang")
            update = asyncio.ensure_future(case.try_update(2))
            await eventually(lambda: "worker.stage" in case.faults.events(), "the push begins")
            parked = asyncio.ensure_future(case.pool.call("look"))
            await asyncio.sleep(0)
            case.pool.end_updates("the attempt is stopping")
            assert 1 == (await parked).version
            assert isinstance(await update, UpdatesEndedError)
            events = case.faults.events()
            back = events[events.index("exporter.finalize") :]
            assert ["worker.finalize", "worker.restore", "worker.resume"] == back[1:4]
            with pytest.raises(UpdatesEndedError, match="stopping"):
                await case.pool.update(2)
            assert {1} == await case.check_contract()

    run(case())


def test_a_journal_tells_how_far_an_update_came(tmp_path: Path) -> None:
    """Every step is noted before it is taken; what ended, and how, is noted at the end."""

    async def case() -> list[UpdateStep]:
        journal = Journal(str(tmp_path / "updates" / "pool"))
        seen: list[UpdateStep] = []
        async with pool_of(tmp_path, n=1, journal=journal) as case:
            case.faults.arm("worker", "stage", "slow")
            update = asyncio.ensure_future(case.try_update(2))
            await eventually(lambda: "worker.stage" in case.faults.events(), "the push begins")
            seen.append(journal.last())
            case.faults.disarm()
            await update
            seen.append(journal.last())
            case.faults.arm("exporter", "export", "raise")
            await case.try_update(3)
            return [*seen, journal.last()]

    during, after, failed = run(case())

    found = [(s.step, s.from_version, s.to_version, s.served) for s in (during, after, failed)]
    assert [("transfer", 1, 2, 1), ("committed", 1, 2, 2), ("rolled_back", 2, 3, 2)] == found
    assert [False, True, True] == [s.is_over for s in (during, after, failed)]
    assert during.session == after.session != failed.session


def test_an_update_needs_no_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the journal cannot be written the update goes on, and the log says so."""

    journal = Journal(str(tmp_path / "updates" / "pool"))
    Path(journal.path).mkdir()

    async def case() -> None:
        async with pool_of(tmp_path, n=1, journal=journal) as case:
            assert {1} == await case.check_contract()

    run(case())

    assert 1 == caplog.text.count("is not noted any more")


@pytest.mark.parametrize("phase", ["commit", "resume"])
def test_a_worker_that_holds_something_else_is_fenced(tmp_path: Path, phase: str) -> None:
    """What a worker says that it holds is compared with what was pushed, before it serves."""

    async def case() -> None:
        async with pool_of(tmp_path, n=3, policy=replace(QUICK, replace_dead=False)) as case:
            host = case.pool._seats["worker-1"].member.host
            method = getattr(host, phase)

            def other(*arguments: object) -> object:
                answer = method(*arguments) if phase == "commit" else None
                if phase == "commit":
                    return replace(answer, digest="0" * 64)
                host._held = replace(host._held, version=7)
                return method(*arguments)

            setattr(host, phase, other)
            result = await case.try_update(2)
            report = result if isinstance(result, UpdateReport) else result.update_report
            assert (Outcome.COMMITTED, ["worker-1"]) == (report.outcome, list(report.fenced))
            assert {2} == await case.check_contract()
            assert ["worker-0", "worker-2"] == case.pool.state().serving

    run(case())


def test_a_request_that_hangs_costs_its_worker(tmp_path: Path) -> None:
    """
    With a limit, a worker that does not answer is killed and replaced, and the request is
    retryable; a method's own TimeoutError is its answer.
    """

    async def case() -> None:
        async with pool_of(tmp_path, n=2, request_timeout_s=HANG_S) as case:
            case.faults.arm("worker", "request", "hang")
            with pytest.raises(Retryable, match="did not answer within 2 s") as raised:
                await case.pool.call("work", 1)
            assert (1, True) == (raised.value.version, raised.value.begun)
            case.faults.disarm()
            assert 1 == (await case.pool.call("look")).version
            await eventually(lambda: len(case.pool.state().serving) == 2, "it is replaced")
            with pytest.raises(TimeoutError, match="mine"):
                await case.pool.call("time_out")
            assert 2 == len(case.pool.state().serving)

    run(case())


def test_workers_say_how_they_stand(tmp_path: Path) -> None:
    """In the middle of an update too; the pool says which phase it is in."""

    async def case() -> None:
        async with pool_of(tmp_path, n=2) as case:
            case.faults.arm("worker", "stage", "slow")
            update = asyncio.ensure_future(case.pool.update(2))
            await eventually(lambda: "worker.stage" in case.faults.events(), "the push begins")
            during, phase = await case.pool.health(), case.pool.state().phase
            case.faults.disarm()
            await update
            after = await case.pool.health()
            await case.pool._seats["worker-1"].member.kill(1)
            assert (Phase.TRANSFER, None) == (phase, case.pool.state().phase)
            assert [(1, False)] * 2 == [(h.held.version, h.is_open) for h in during.values()]
            assert [(2, True)] * 2 == [(h.held.version, h.is_open) for h in after.values()]
            assert None is (await case.pool.health())["worker-1"]

    run(case())


def test_closing_answers_everybody(tmp_path: Path) -> None:
    """A pool that is closed answers the parked, and winds up an update in progress."""

    async def case() -> None:
        async with pool_of(tmp_path, n=1, policy=replace(QUICK, cancel_s=HANG_S)) as case:
            case.faults.arm("worker", "stage", "hang")
            update = asyncio.ensure_future(case.try_update(2))
            await eventually(lambda: not case.pool.state().serving, "the pool is paused")
            parked = asyncio.ensure_future(case.pool.call("look"))
            await asyncio.sleep(0)
            await case.pool.close()
            with pytest.raises(Retryable, match="closed"):
                await parked
            assert isinstance(await update, PoolUnrecoverable | ServingError)

    run(case())


def test_a_request_waits_no_longer_than_asked(tmp_path: Path) -> None:
    """A request with ``wait_s`` that finds every worker busy is retryable."""

    async def case() -> None:
        async with pool_of(tmp_path, n=1) as case, case.pool.lease():
            with pytest.raises(Retryable, match="no worker was free"):
                await case.pool.call("look", wait_s=0.05)

    run(case())


def test_a_lease_is_of_one_version(tmp_path: Path) -> None:
    """What a lease answers comes from its version, or is retryable."""

    async def case() -> None:
        async with pool_of(tmp_path, n=2) as case, case.pool.lease() as lease:
            assert 1 == (await lease.call("look")).version
            await case.pool.update(2)
            with pytest.raises(Retryable):
                await lease.call("look")

    run(case())


@pytest.mark.parametrize("how", ["raise", "commit"])
def test_without_an_exporter_the_same_guard_holds(tmp_path: Path, how: str) -> None:
    """
    Workers that get each version's state by themselves are paused, rolled back and
    resumed like others.
    """

    class Colocated(StatefulWorker):
        def __init__(self, faults):
            self.faults, self.current, self.next = faults, None, None

        def stage(self, version, parts):
            assert [] == list(parts)
            self.faults.happen("worker", "stage", str(id(self)))
            self.next = version

        def commit(self, version):
            self.current = self.next

        def look(self):
            return {self.current}, self.version

    async def case() -> None:
        async with pool_of(tmp_path, kind=Colocated, exporter=None) as case:
            if how == "raise":
                case.faults.arm("worker", "stage", "raise")
                assert isinstance(await case.try_update(2), BoomError)
                assert {1} == await case.check_contract()
            else:
                await case.pool.update(2)
                assert {2} == await case.check_contract()
            assert 3 == len(case.pool.state().serving)

    run(case())


def test_a_lost_exporter_is_named(tmp_path: Path) -> None:
    """
    The exporter does not answer: the message names phase, member, version and time; the
    old version is served, and another exporter is there for the next update.
    """

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("exporter", "export", "hang")
            case.pool.policy = replace(QUICK, build_s=HANG_S)
            error = await case.try_update(2)
            case.pool.policy = QUICK
            assert isinstance(error, PhaseFailedError)
            fields = {name: error.fields[name] for name in ("phase", "member", "version")}
            assert {"phase": "build", "member": "exporter", "version": 2} == fields
            assert error.fields["elapsed_s"] >= HANG_S
            assert {1} == await case.check_contract()
            case.faults.disarm()
            await case.pool.update(3)
            assert {3} == await case.check_contract()

    run(case())


def test_a_second_update_is_refused(tmp_path: Path) -> None:
    """An update during an update is refused at once, and disturbs nothing."""

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("worker", "stage", "slow")
            first = asyncio.ensure_future(case.pool.update(2))
            await eventually(lambda: "worker.stage" in case.faults.events(), "the push begins")
            with pytest.raises(UpdateInProgress):
                await case.pool.update(3)
            case.faults.disarm()
            assert Outcome.COMMITTED is (await first).outcome
            with pytest.raises(ServingError, match="not above 2"):
                await case.pool.update(2)

    run(case())


def test_a_raise_in_pause_rolls_back_without_a_kill(tmp_path: Path) -> None:
    """One worker that merely refuses to pause keeps the old version for all, nobody is killed."""

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("worker", "pause", "raise")
            error = await case.try_update(2)
            assert isinstance(error, BoomError)
            assert ({1}, {}) == (await case.check_contract(), error.update_report.fenced)
            assert 3 == len(case.pool.state().serving)

    run(case())


def test_a_hang_in_pause_costs_that_worker_only(tmp_path: Path) -> None:
    """The others are updated; the hanging one is replaced and brought to the new version."""

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.arm("worker", "pause", "hang")
            case.pool.policy = replace(QUICK, pause_s=HANG_S)
            report = await case.pool.update(2)
            assert isinstance(report, UpdateReport)
            assert (2, 1) == (report.version, len(report.fenced))
            assert {2} == await case.check_contract()
            case.faults.disarm()
            await eventually(lambda: len(case.pool.state().serving) == 3, "it is replaced")
            assert {2} == await case.check_contract()

    run(case())


def test_overlap_serves_while_it_pushes(tmp_path: Path) -> None:
    """With ``overlap`` requests are answered by the old version until the commit."""

    async def case() -> None:
        async with pool_of(tmp_path, n=2, policy=replace(QUICK, overlap=True)) as case:
            case.faults.arm("worker", "stage", "slow", only_one=False)
            update = asyncio.ensure_future(case.pool.update(2))
            await eventually(lambda: "worker.stage" in case.faults.events(), "the push begins")
            assert 1 == (await case.pool.call("look", wait_s=5)).version
            assert {1} == await case.check_contract()
            case.faults.disarm()
            report = await update
            assert {2} == await case.check_contract()
            events = case.faults.events()
            assert events.index("worker.stage") < events.index("worker.pause")
            assert Outcome.COMMITTED is report.outcome

    run(case())


def test_workers_without_caches_serve_while_they_receive(tmp_path: Path) -> None:
    """
    Unless told otherwise, only a worker that is in place is paused for the push, and only
    one with a ``release`` of its own before the state is built.
    """

    class Plain(Faulty):
        release = StatefulWorker.release

    class PlainInPlace(InPlace):
        release = StatefulWorker.release

    async def before_the_pause(kind: type[Faulty], policy: UpdatePolicy) -> list[str]:
        async with pool_of(tmp_path, n=1, kind=kind, policy=policy) as case:
            await case.pool.update(2)
            assert {2} == await case.check_contract()
            events = case.faults.events()
            before = events[: events.index("worker.pause")]
            return [name for name in ("exporter.export", "worker.stage") if name in before]

    patient = replace(QUICK, overlap=False)
    assert ["exporter.export", "worker.stage"] == run(before_the_pause(Plain, QUICK))
    assert ["exporter.export"] == run(before_the_pause(Plain, patient))
    assert ["exporter.export"] == run(before_the_pause(PlainInPlace, QUICK))
    assert [] == run(before_the_pause(Faulty, QUICK))
    assert [] == run(before_the_pause(InPlace, QUICK))


def test_the_total_limit_ends_an_update(tmp_path: Path) -> None:
    """What is not pushed when ``total_s`` is over is rolled back, and nobody is killed."""

    async def case() -> None:
        policy = replace(QUICK, total_s=1e-4)
        async with pool_of(tmp_path, n=2, version=None, policy=policy) as case:
            error = await case.try_update(1)
            assert isinstance(error, PhaseFailedError)
            assert "total_s" in str(error)
            assert {WorkerState.STALE} == set(case.pool.state().workers.values())

    run(case())


def test_a_worker_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    """The exception of the worker's constructor comes out of start()."""

    class NoWeights(StatefulWorker):
        def __init__(self, faults):
            raise OSError("no weights here")

    async def case() -> None:
        with pytest.raises(OSError, match="no weights here"):
            async with pool_of(tmp_path, kind=NoWeights):
                pass

    run(case())


def test_a_worker_that_dies_over_and_over_is_given_up(tmp_path: Path) -> None:
    """A place that is filled in vain is given up, and the pool with its last one."""

    async def case() -> None:
        async with pool_of(tmp_path, n=1, policy=replace(QUICK, replacements=2)) as case:
            case.faults.arm("worker", "prepare", "raise", only_one=False)
            await case.pool._seats["worker-0"].member.kill(1)
            await eventually(lambda: case.pool.state().unrecoverable, "the pool gives up")
            with pytest.raises(PoolUnrecoverable, match="died 3 times"):
                await case.pool.call("look")

    run(case())


def test_an_update_that_is_torn_off_leaves_nobody_serving(tmp_path: Path) -> None:
    """An error in the pool's own code, in the middle of an update: nothing serves by chance."""

    async def case() -> None:
        async with pool_of(tmp_path, n=2) as case:
            make = case.pool._make_execution

            def breaking(*arguments, **named):
                execution = make(*arguments, **named)
                follow = execution.on_step

                def break_at_commit(step):
                    follow(step)
                    if step is not None and step.phase == "commit":
                        raise ZeroDivisionError

                execution.on_step = break_at_commit
                return execution

            case.pool._make_execution = breaking
            with pytest.raises(ZeroDivisionError):
                await case.pool.update(2)
            assert set() == await case.check_contract()
            with pytest.raises(PoolUnrecoverable, match="ended in the middle"):
                await case.pool.call("look")

    run(case())


def test_what_cannot_be_right_is_refused() -> None:
    """Arguments that make no pool are refused, each with what to do."""

    class InPlaceWorker(StatefulWorker):
        in_place = True

    places = LocalPlaces()
    wrong = [
        lambda: ServingPool(int, 2, places=places),
        lambda: ServingPool(StatefulWorker, 0, places=places),
        lambda: ServingPool(StatefulWorker, 2, exporter=StatefulWorker, places=places),
        lambda: ServingPool(StatefulWorker, 2, policy=UpdatePolicy(min_serving=3), places=places),
        lambda: ServingPool(InPlaceWorker, 2, policy=UpdatePolicy(overlap=True), places=places),
        lambda: ServingPool(StatefulWorker, 2, transport="carrier-pigeon", places=places),
        lambda: ServingPool(StatefulWorker, 2, request_timeout_s=0, places=places),
        lambda: UpdatePolicy(pause_s=0),
        lambda: UpdatePolicy(pause="freeze"),
        lambda: ServingPool(StatefulWorker, 2, policy=UpdatePolicy(pause="keep"), places=places),
        lambda: UpdatePolicy(retries=-1),
    ]
    for make in wrong:
        with pytest.raises(ConfigError):
            make()


def test_the_newest_version_is_the_exporters(tmp_path: Path) -> None:
    """The exporter says which version is newest; one that hangs is replaced."""

    async def case() -> None:
        async with pool_of(tmp_path) as case:
            case.faults.say_newest(7)
            assert 7 == await case.pool.newest_version()
            case.faults.arm("exporter", "newest", "hang")
            case.pool.policy = replace(QUICK, prepare_s=HANG_S)
            with pytest.raises(ServingError, match="started again"):
                await case.pool.newest_version()
            case.pool.policy = QUICK
            case.faults.disarm()
            case.faults.say_newest(8)
            assert 8 == await case.pool.newest_version()

    run(case())


def test_hooks_that_are_missing_say_so() -> None:
    """The hooks that a class must override name it."""
    with pytest.raises(NotImplementedError, match="StateExporter"):
        StateExporter().export(1)
    with pytest.raises(NotImplementedError, match="StateExporter"):
        StateExporter().newest_version()
    with pytest.raises(NotImplementedError, match="StatefulWorker"):
        StatefulWorker().apply(1, iter(()))
