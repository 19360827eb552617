"""Takes the steps of an update with real members, each under its deadline.

Every call of a step is settled before the next step: it has returned, raised, or its member
is dead or has not answered in time, and those are killed before anything else happens.
Nothing is left that could commit after the update has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcresume.serving.errors import PhaseFailedError, StateError
from hpcresume.serving.host import Held
from hpcresume.serving.members import Member, MemberDiedError
from hpcresume.serving.policy import Outcome, Phase, UpdatePolicy, UpdateReport
from hpcresume.serving.state import Manifest, describe
from hpcresume.serving.update import EXPORTER, Answer, How, Step, Update
from hpcresume.updates import Journal, UpdateStep

log = logging.getLogger(__name__)

_FORWARD = frozenset({Phase.PAUSE, Phase.RELEASE, Phase.PREPARE, Phase.BUILD, Phase.TRANSFER})
_LEAST_S = 5.0
_sessions = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Payload:
    """A state that can be pushed.

    Attributes:
        manifest: What it consists of.
        chunks: What the workers are given for its chunks.
        session: The transport's name for what it occupies.
    """

    manifest: Manifest
    chunks: tuple[Any, ...] = ()
    session: str = ""

    @property
    def held(self) -> Held:
        """What a worker holds that has committed it."""
        return Held(self.manifest.version, self.manifest.digest)


@dataclass(slots=True)
class Execution:
    """One session: the steps of one update.

    Attributes:
        update: The update.
        members: Who takes part, by name; the exporter too.
        policy: Deadlines.
        old: The state that is served.
        new: The state to serve; built on the way where it is not given.
        on_step: Told before every step, and of None at the end.
        on_resumed: Told of every worker that takes requests again.
        journal: Where every step is noted before it is taken.
    """

    update: Update
    members: Mapping[str, Member]
    policy: UpdatePolicy
    old: Payload | None = None
    new: Payload | None = None
    on_step: Callable[[Step | None], None] = lambda _: None
    on_resumed: Callable[[str], None] = lambda _: None
    journal: Journal | None = None
    session: int = field(default_factory=lambda: next(_sessions))
    _name: str = field(default_factory=lambda: secrets.token_hex(8))
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)
    _start: float = field(default_factory=time.monotonic)
    _paused_at: float | None = None
    _cancel_s: float = 0.0

    def cancel(self, error: BaseException, *, within_s: float | None = None) -> None:
        """Wind the update up; what runs is given ``within_s``, or the policy's ``cancel_s``."""
        self.update.cancelled = error
        self._cancel_s = self.policy.cancel_s if within_s is None else within_s
        self._hurry.set()

    @property
    def occupied(self) -> str:
        """The transport's name for what this session may have left."""
        return self._name

    async def run(self) -> UpdateReport:
        """Take every step; never raises for what members do."""
        steps, answers = self.update.run(), None
        while True:
            try:
                step = next(steps) if answers is None else steps.send(answers)
            except StopIteration:
                break
            self.on_step(step)
            self._note(step.phase, self.update.old if step.is_old else step.version)
            answers = await self._perform(step)
        self.on_step(None)
        report = self.update.report
        if report.outcome is not None:
            self._note(report.outcome, report.version)
        report.size_bytes = self.new.manifest.size_bytes if self.new is not None else 0
        return report

    def _note(self, step: Phase | Outcome, version: int | None) -> None:
        if self.journal is None:
            return
        update = self.update
        try:
            self.journal.write(UpdateStep(self._name, step, update.old, update.new, version))
        except OSError as error:
            # The update itself needs no disk.
            log.warning("how far this update comes is not noted any more: %s", error)
            self.journal = None

    async def _perform(self, step: Step) -> dict[str, Answer]:
        begun = time.monotonic()
        if step.phase is Phase.PAUSE:
            self._paused_at = begun
        if step.phase is Phase.FENCE:
            answers = await self._fence(step)
        elif step.phase in _FORWARD and not step.is_old and self._time_left() <= 0:
            answers = self._refuse(step)
        else:
            limit = self.policy.limit_s(step.phase)
            if step.phase in _FORWARD and not step.is_old:
                # Nobody is killed for having been asked in the last moment.
                limit = min(limit, max(self._time_left(), _LEAST_S))
            answers = await self._ask(step, limit)
        spent = self.update.report.phases_s
        spent[step.phase] = spent.get(step.phase, 0.0) + time.monotonic() - begun
        return answers

    def _time_left(self) -> float:
        return self.policy.total_s - (time.monotonic() - self._start)

    def _refuse(self, step: Step) -> dict[str, Answer]:
        reason = f"was not asked any more, since total_s={self.policy.total_s:g} is over,"
        return {
            name: Answer(How.RAISED, error=self._failure(step, name, reason)) for name in step.names
        }

    def _failure(self, step: Step, name: str, reason: str) -> PhaseFailedError:
        elapsed = time.monotonic() - self._start
        return PhaseFailedError(step.phase, name, step.version, elapsed, reason)

    async def _fence(self, step: Step) -> dict[str, Answer]:
        names = [name for name in step.names if name in self.members]
        limit = self.policy.fence_s
        dead = await asyncio.gather(*(self.members[name].kill(limit) for name in names))
        for name, is_dead in zip(names, dead, strict=True):
            if not is_dead:
                log.error("%s was killed and is not known to be dead; it is not used again", name)
        return {}

    async def _ask(self, step: Step, limit_s: float) -> dict[str, Answer]:
        """Have everybody take the step, and settle every call."""
        calls = {
            name: asyncio.ensure_future(self._call(step, name, self.members[name]))
            for name in step.names
        }
        await self._settle(calls.values(), limit_s)
        answers = {}
        for name, call in calls.items():
            if not call.done():
                call.cancel()
                reason = "did not answer"
                answers[name] = Answer(How.HUNG, error=self._failure(step, name, reason))
            else:
                answers[name] = call.result()
        return answers

    async def _settle(self, calls: Iterable[asyncio.Future[Answer]], limit_s: float) -> None:
        """Wait for calls until the limit, or until a cancellation's own."""
        end = time.monotonic() + limit_s
        hurry = asyncio.ensure_future(self._hurry.wait())
        pending: set[asyncio.Future[Any]] = set(calls)
        try:
            while pending and (left := end - time.monotonic()) > 0:
                waited = pending if hurry.done() else {*pending, hurry}
                await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                pending = {call for call in pending if not call.done()}
                if hurry.done():
                    end = min(end, time.monotonic() + self._cancel_s)
                    if pending:
                        await asyncio.wait(pending, timeout=end - time.monotonic())
                    return
        finally:
            hurry.cancel()

    async def _call(self, step: Step, name: str, member: Member) -> Answer:
        try:
            value = await self._send(step, member, is_exporter=name == EXPORTER)
        except MemberDiedError:
            return Answer(How.DEAD, error=self._failure(step, name, "died"))
        except Exception as error:
            error.add_note(f"raised by {name} in phase {step.phase} of version {step.version}")
            return Answer(How.RAISED, error=error)
        if step.phase is Phase.RESUME:
            self._note_resumed(name)
        return Answer(How.OK, value)

    def _note_resumed(self, name: str) -> None:
        if self._paused_at is not None:
            self.update.report.gap_s = time.monotonic() - self._paused_at
            self._paused_at = None
        self.on_resumed(name)

    async def _send(self, step: Step, member: Member, *, is_exporter: bool) -> Any:
        phase, version, session = step.phase, step.version, self.session
        if phase is Phase.BUILD:
            return await self._build(step, member)
        if phase is Phase.PAUSE:
            return await member.call("pause", session, self.policy.pause)
        if phase is Phase.PREPARE:
            return await member.call("prepare", session, version)
        if phase in (Phase.RELEASE, Phase.FINALIZE, Phase.RESTORE):
            return await member.call(phase, session)
        payload = self._payload(step)
        if phase is Phase.TRANSFER:
            manifest = payload.manifest
            digest = await member.call("transfer", session, manifest, payload.chunks)
            return _same(digest, manifest.digest)
        if phase is Phase.COMMIT:
            _same(await member.call("commit", session, version), payload.held)
            return version
        assert phase is Phase.RESUME
        assert not is_exporter
        return await member.call("resume", session, payload.held)

    def _payload(self, step: Step) -> Payload:
        if step.is_old:
            assert self.old is not None
            return self.old
        if self.new is None:
            # Without an exporter the workers get the state by themselves.
            self.new = Payload(describe(step.version, ()))
        return self.new

    async def _build(self, step: Step, exporter: Member) -> None:
        manifest = await exporter.call("build", self.session, step.version, self._name)
        chunks = await exporter.chunks(self.session, len(manifest.chunks))
        self.new = Payload(manifest, tuple(chunks), self._name)


def _same(found: Any, wanted: Any) -> Any:
    if found != wanted:
        raise StateError(f"it answers with {found}, not with {wanted}")
    return found
