"""A pool's exporter: made when it is needed, made anew where it has died."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hpcresume.errors import describe
from hpcresume.serving.errors import ServingError
from hpcresume.serving.members import Arguments, Member, MemberDiedError, Places
from hpcresume.serving.policy import UpdatePolicy
from hpcresume.serving.transport import StateTransport
from hpcresume.serving.worker import StateExporter


@dataclass(slots=True)
class Exporting:
    """The place of a pool's exporter.

    Attributes:
        kind: Its class; None: the pool has none.
        arguments: Arguments for the class.
        transport: How states leave.
        places: Where it runs.
        holder: Who holds the place; None: nobody yet.
    """

    kind: type[StateExporter] | None
    arguments: Arguments
    transport: StateTransport
    places: Places
    holder: Member | None = None

    async def member(self, policy: UpdatePolicy) -> Member | None:
        """Return the exporter, made anew where it has died; None where there is none."""
        if self.kind is None:
            return None
        if self.holder is None or self.holder.died.done():
            member = self.places.exporter()
            try:
                async with asyncio.timeout(policy.start_s):
                    await member.call("make", self.kind, self.arguments, self.transport)
            except BaseException:
                await member.kill(policy.fence_s)
                raise
            self.holder = member
        return self.holder

    async def newest_version(self, policy: UpdatePolicy) -> int:
        """Ask it which version is newest; see :meth:`ServingPool.newest_version`."""
        member = await self.member(policy)
        if member is None:
            raise ServingError("the pool has no exporter that could say which version is newest")
        try:
            async with asyncio.timeout(policy.prepare_s):
                newest: int = await member.call("newest_version")
        except (MemberDiedError, TimeoutError) as error:
            await member.kill(policy.fence_s)
            raise ServingError(
                "the exporter does not say which version is newest: "
                f"{describe(error)}. It is started again for the next question."
            ) from error
        return newest
