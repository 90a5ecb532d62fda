"""Actors that outlive a stage: for runs on one machine, where starting them costs as much as judging, and for trials.

Nothing heavy is imported here: Ray Data's own workers load this file to hand units on.
"""

from __future__ import annotations

import asyncio
from typing import Any

Batch = dict[str, Any]


class Dispatcher:
    """An actor that gives each batch to a free member; one that still loads, or waits for its CPUs, is not free."""

    def __init__(self, members: list[Any]) -> None:
        self._members = members
        self._free: asyncio.Queue[Any] = asyncio.Queue()  # members, or what one died of before it was ready

    async def join(self) -> None:
        """Lets every member in once it is ready; call it once."""
        await asyncio.gather(*(self._join(member) for member in self._members))

    async def hand_over(self, batch: Batch) -> Batch:
        """The member's answer; raises what it raises, and what kept a member from starting."""
        member = await self._free.get()
        try:
            if isinstance(member, Exception):
                raise member
            answer: Batch = await member.__call__.remote(batch)
            return answer
        finally:
            self._free.put_nowait(member)

    async def _join(self, member: Any) -> None:
        try:
            await member.__ray_ready__.remote()
        except Exception as error:
            self._free.put_nowait(error)
        else:
            self._free.put_nowait(member)


class Crew:
    """``size`` actors of one class and their dispatcher, until `close` or Ray's end.

    A member that dies is started anew and does its batch again, which finds what was committed.
    """

    def __init__(self, actor: type, size: int, arguments: tuple[Any, ...], **resources: Any) -> None:
        import ray

        remote = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(actor)
        self.size = size
        self._members = [remote.remote(*arguments) for _ in range(size)]
        self._dispatcher = ray.remote(num_cpus=0)(Dispatcher).remote(self._members)
        self._dispatcher.join.remote()

    def hand_over(self, batch: Batch) -> Batch:
        """The answers for a batch of units, each done alone by whoever is free; as Ray Data's map function."""
        answers = self.map([{"unit": [unit]} for unit in batch["unit"]])
        return {name: [value for answer in answers for value in answer[name]] for name in answers[0]}

    def map(self, batches: list[Batch]) -> list[Batch]:
        """All batches, answers in their order."""
        import ray

        answers: list[Batch] = ray.get([self._dispatcher.hand_over.remote(batch) for batch in batches])
        return answers

    def close(self) -> None:
        """Ends the actors; what they are at is left undone."""
        import ray

        for actor in (*self._members, self._dispatcher):
            ray.kill(actor)
