"""What the benchmarks share: the time and memory of a step, and alternating rounds of several."""
import time
from collections.abc import Callable

import torch

Step = Callable[[], None]


def seconds(step: Step, device: str) -> float:
    """Return the wall time of one step, its work on the device included."""
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def alternate(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each step in each round; in a round all run in turn, so that noise meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return times


def peak_bytes(step: Step, device: str) -> int:
    """Return the most that one step holds at any moment beyond what was there before."""
    step()
    if device == 'cuda':
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak
