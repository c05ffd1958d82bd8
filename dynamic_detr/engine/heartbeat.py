"""Progress of the processes of a run, and which of them hangs."""

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

__all__ = ["Beat", "Observer"]

# A thread sends the beats; a call that holds Python's global lock delays them.
_SILENT_SECONDS = 120


@dataclass(frozen=True)
class Beat:
    """State of a process.

    Args:
        host: name of its machine.
        pid: process id.
        tick: number of beats so far.
        steps: number of progress reports so far.
        order: position of the present place among the places that every process passes.
        place: what the process is doing, in words.
        waiting: whether it waits for the others in :meth:`Watch.meet`.
    """

    host: str = "an unknown machine"
    pid: int = 0
    tick: int = 0
    steps: int = 0
    order: float = -1
    place: str = "starting"
    waiting: bool = False

    def dump(self) -> str:
        return json.dumps(astuple(self))

    @classmethod
    def load(cls, text: bytes) -> "Beat":
        return cls(*json.loads(text))


@dataclass
class _Seen:
    beat: Beat
    ticked: float  # time of the last change of the tick
    moved: float  # time of the last progress


@dataclass
class Observer:
    """Find the process that hangs.

    Only the clock of the observer is used, so clocks of the machines may differ.
    """

    _seen: dict[int, _Seen] = field(default_factory=dict)

    def problem(
        self, beats: Mapping[int, Beat | None], hang_seconds: float, now: float
    ) -> tuple[int, str] | None:
        """Return the process that hangs, if there is one.

        Processes that wait for it in a collective operation make no progress either, so it is the
        one with the lowest order.

        Args:
            beats: last beat by rank; None for a process that has sent none.
            hang_seconds: longest time without progress.
            now: present time in seconds.

        Returns:
            The rank and what is wrong, in words; None if no process hangs.
        """
        for rank, beat in beats.items():
            beat = beat or Beat()
            seen = self._seen.setdefault(rank, _Seen(beat, now, now))
            if beat.tick != seen.beat.tick:
                seen.ticked = now
            if beat.steps != seen.beat.steps:
                seen.moved = now
            seen.beat = beat
        found = {rank: self._seen[rank] for rank in beats}
        silence = min(_SILENT_SECONDS, hang_seconds)
        for rank, seen in found.items():
            if seen.beat.tick and now - seen.ticked > silence:
                return rank, f"has not been heard of for {silence:g} s"
        busy = {rank: seen for rank, seen in found.items() if not seen.beat.waiting}
        if not any(now - seen.moved > hang_seconds for seen in busy.values()):
            return None
        rank = min(busy, key=lambda rank: (busy[rank].beat.order, busy[rank].moved))
        return rank, f"made no progress for {hang_seconds:g} s (SOLVER.HANG_SECONDS)"
