"""How far each process of a run has come, and which one holds the others up."""

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

__all__ = ["Beat", "Observer"]

# A thread beside the main one sends beats, so one call that keeps Python's lock delays them.
_SILENT_SECONDS = 120


@dataclass(frozen=True)
class Beat:
    """What a process tells of itself.

    Args:
        host: name of its machine.
        pid: of the process.
        tick: counts the beats.
        steps: counts the progress made.
        order: of the present place among the places that every process comes through.
        place: what the process is doing, in words.
        waiting: whether it waits for the others, and so holds nobody up.
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
    ticked: float  # when the tick changed last
    moved: float  # when there was progress last


@dataclass
class Observer:
    """Finds the process that hangs.

    Times are the observer's own, so the machines' clocks need not agree.
    """

    _seen: dict[int, _Seen] = field(default_factory=dict)

    def problem(
        self, beats: Mapping[int, Beat | None], hang_seconds: float, now: float
    ) -> tuple[int, str] | None:
        """Look at every process.

        A process that waits in a collective operation makes no progress either: the one that is
        behind the others is to blame.

        Args:
            beats: the last one by rank; None of a process that has sent none.
            hang_seconds: how long a process may make no progress.
            now: in seconds.

        Returns:
            The rank and what is wrong, in words; None if all is well.
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
