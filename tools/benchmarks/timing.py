"""Times of several functions that are called in turns, so that other load slows all alike.

`torch.utils.benchmark` measures one function after the other.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

__all__ = ["Timing", "time_in_turns"]


@dataclass
class Timing:
    """Measurements of one function.

    Args:
        seconds: duration of each call, without the warm-up call.
        peak_bytes: peak of allocated GPU memory during the last call, including what was allocated
            before it; None on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def time_in_turns(
    functions: dict[str, Callable[[], object]], device: str, rounds: int, budget: float, title: str
) -> dict[str, Timing]:
    """Call every function once per round, after one round of warm-up.

    Args:
        functions: functions by name.
        device: "cuda" or "cpu"; on "cuda" it synchronises around each call.
        rounds: number of measured rounds.
        budget: seconds per function; a function that has used them is not called again. A first
            call that takes longer counts as its measurement.
        title: title of the progress bar.

    Returns:
        Timings by name, each with at least one measurement.
    """
    timings = {name: Timing() for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    turns = [(number, name) for number in range(rounds + 1) for name in functions]
    for number, name in tqdm(turns, desc=title, leave=False):
        timing = timings[name]
        if spent[name] > budget and timing.seconds:
            continue
        seconds, peak = _call(functions[name], device)
        spent[name] += seconds
        if number == 0 and seconds <= budget:  # warm-up; a slow call is measured unwarmed
            continue
        timing.seconds.append(seconds)
        timing.peak_bytes = peak
    return timings


def _call(function: Callable[[], object], device: str) -> tuple[float, int | None]:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None
