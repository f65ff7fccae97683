"""Seconds between device events, bytes at the allocator's peak, and the roofs that figures are held against."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.ops import KeyFormat

ROOF_SIZE = 8192
_ROOF_SIZE_CPU = 512  # for smoke tests
_ROOF_PRODUCTS = 10
_ROOF_S = 0.33
_SETTLE_S = 0.33  # as long as the roof
_LONG_S = 10.0
_ROOF_REPEATS = 100  # more than fit


@dataclass(frozen=True)
class Timing:
    """Median seconds of the timed repeats, and the peak of device bytes beyond what was held before."""

    seconds: float
    peak_bytes: int
    repeats: int


def measure(
    work: Callable[[], object],
    device: str,
    *,
    budget_s: float = 6.0,
    max_repeats: int = 10,
    when_warm: Callable[[], object] | None = None,
) -> Timing:
    """Run once to warm up, then as often as the budget allows (at least once), and take the median. A first run of more
    than ten seconds counts itself: what it loads and compiles is lost in it.

    On CUDA the time is between device events and the peak is the allocator's; on a CPU the peak is reported as 0.
    when_warm: called after the warm-up; on CUDA the work alone is then kept up for a third of a second, once at least,
    before the runs that count: a device at its power limit takes some time to find the clock that suits the work, and
    comes out of a long matrix product up to a quarter slower.
    """
    on_cuda = device != "cpu"
    before = 0
    if on_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    first = seconds_of(work, device)
    peak = torch.cuda.max_memory_allocated() - before if on_cuda else 0
    if when_warm is not None:
        when_warm()
    if first > _LONG_S:
        return Timing(first, peak, 1)
    if when_warm is not None and on_cuda:
        keep_up(work, _SETTLE_S, torch.cuda.synchronize)
    # the first run that is warm says how many there is time for: the one before may have compiled what it needs
    samples = [seconds_of(work, device)]
    repeats = max(1, min(max_repeats, int(budget_s / max(samples[0], 1e-6))))
    samples += [seconds_of(work, device) for _ in range(repeats - 1)]
    return Timing(statistics.median(samples), peak, repeats)


def keep_up(
    work: Callable[[], object],
    least_s: float,
    wait: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Run the work, wait for its end, and so on until `least_s` seconds are over."""
    begin = clock()
    while True:
        work()
        wait()
        if clock() - begin >= least_s:
            return


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds of one run, without a warm-up."""
    if device == "cpu":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def roof_tflops(key_format: KeyFormat, device: str) -> float:
    """TFLOP/s of a dense product [8192, 8192]² of that element type by the vendor's library, kept up for a third of a
    second (512² in float32 on a CPU)."""
    n = ROOF_SIZE if device != "cpu" else _ROOF_SIZE_CPU
    product = _product(key_format, n, device)

    def several() -> None:
        for _ in range(_ROOF_PRODUCTS):
            product()

    return (
        _ROOF_PRODUCTS * 2 * n**3 / measure(several, device, budget_s=_ROOF_S, max_repeats=_ROOF_REPEATS).seconds / 1e12
    )


def copy_bytes_s(device: str) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes together (1 MiB on a CPU)."""
    size = 1 << (20 if device == "cpu" else 30)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / measure(lambda: target.copy_(source), device, budget_s=0.05).seconds


def _product(key_format: KeyFormat, n: int, device: str) -> Callable[[], Tensor]:
    a, b = (torch.randn((n, n), device=device) for _ in range(2))
    if key_format is KeyFormat.FP8_E4M3 and device != "cpu":
        one = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        return lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    dtype = torch.float32 if device == "cpu" else key_format.torch_dtype
    x, y = a.to(dtype), b.to(dtype)
    return lambda: torch.mm(x, y)
