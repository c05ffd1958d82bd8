"""Times of several functions, taken in turns so that whatever else the machine does falls on all
of them alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

__all__ = ["Timing", "time_in_turns"]


@dataclass
class Timing:
    """What was measured of one function.

    Args:
        seconds: of each call, without the first one, which warms up.
        peak_bytes: the most memory of the GPU that a call held, all that was there before
            included; None on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def time_in_turns(
    functions: dict[str, Callable[[], object]], device: str, rounds: int, budget: float, title: str
) -> dict[str, Timing]:
    """Calls every function once a round.

    Args:
        functions: by name.
        device: "cuda" or "cpu"; on "cuda" each call is waited for.
        rounds: measured calls of each function.
        budget: seconds after which a function is called no more; it has been measured once then.
        title: beside the progress bar.

    Returns:
        A timing for each name, with at least one measurement.
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
        if number == 0 and seconds <= budget:  # a call that takes so long needs no warming up
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
