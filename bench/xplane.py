"""GPU kernels out of jax.profiler traces, by device, and the classes that they belong to.

Only names and times are read: in jaxlib 0.11.2 reading an event's stats ends the interpreter.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

#: Classes of kernels, and what their names contain. The first that fits counts.
CLASSES = {
    "fused tail": r"jax_gemma_arf|allreduce_fusion_kernel",
    # "psum_...": XLA's own kernel for small all-reduces, named after the operation.
    "all-reduce": r"nccl|psum|all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter|collective",
    "matmul": r"gemm|gemv|nvjet|cutlass|xmma|cublas|dot|matmul|splitk",
}
ELEMENTWISE = "norm and elementwise"
IDLE = "idle gap"
#: In the order in which tables and plots show them.
ORDER = ("matmul", "all-reduce", ELEMENTWISE, "fused tail", IDLE)
#: Kernels that wait for their peers, so that a rank's time includes what the others are late.
WAITING = ("all-reduce", "fused tail")


class Kernel(NamedTuple):
    """One kernel (or copy, or fill) on a device. Nanoseconds."""

    name: str
    start: float
    end: float

    @property
    def duration(self) -> float:
        return self.end - self.start


#: Kernels of each device, ordered by start.
Trace = dict[str, list[Kernel]]


def load(path: Path) -> Trace:
    """The kernels in an .xplane.pb (or its text form, .txtpb), or in the one file below a folder.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a folder holds several, the file is truncated or is no trace, or no GPU is in
        the trace.
    """
    if path.is_dir():
        found = sorted(path.glob("**/*.xplane.pb"))
        if not found:
            raise FileNotFoundError(f"no .xplane.pb below {path}")
        if len(found) > 1:
            raise ValueError(f"several traces below {path}, name one: {', '.join(map(str, found))}")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"there is no trace {path}")
    reader = jax.profiler.ProfileData
    try:
        if path.suffix == ".txtpb":
            content = reader.text_proto_to_serialized_xspace(path.read_text())
        else:
            content = path.read_bytes()
        profile = reader.from_serialized_xspace(content)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated, or no trace: {error}") from None
    trace = {
        plane.name: sorted(
            (
                Kernel(event.name, event.start_ns, event.end_ns)
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            ),
            key=lambda kernel: kernel.start,
        )
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
    }
    trace = {name: kernels for name, kernels in trace.items() if kernels}
    if not trace:
        raise ValueError(f"{path} has no kernels of a GPU")
    return trace


def record(call: Callable[[], Any], directory: Path) -> None:
    """Writes a trace of one call below directory: kernels only."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        jax.block_until_ready(call())


def busy(kernels: Sequence[Kernel]) -> float:
    """Nanoseconds in which at least one kernel ran."""
    total, until = 0.0, 0.0
    for kernel in kernels:
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def gap(kernels: Sequence[Kernel], kind: str) -> float | None:
    """Mean nanoseconds between a kernel of that class and the kernels in front of it.

    A programmatic launch may start before the kernel in front has ended; such a gap is 0. None
    without kernels of that class.
    """
    gaps, until = [], kernels[0].end
    for kernel in kernels[1:]:
        if classify(kernel.name) == kind:
            gaps.append(max(0.0, kernel.start - until))
        until = max(until, kernel.end)
    return sum(gaps) / len(gaps) if gaps else None


def overlap(kernels: Sequence[Kernel]) -> float:
    """Returns the share of kernels that start before those in front have ended.

    In a CUDA graph whose programmatic edges are honoured it is nearly 1, without them nearly 0.
    """
    early, until = 0, kernels[0].start
    for kernel in kernels:
        early += kernel.start < until
        until = max(until, kernel.end)
    return early / len(kernels)


def gap_microseconds(call: Callable[[], Any], kind: str) -> float | None:
    """Mean gap in front of the kernels of a class in a call, on the device where it is smallest.

    Devices wait for each other in their kernels, not between them. None if the trace has no GPU or
    no such kernel.
    """
    trace = traced(call)
    gaps = [gap(kernels, kind) for kernels in trace.values()]
    return min((found / 1e3 for found in gaps if found is not None), default=None)


def traced(call: Callable[[], Any]) -> Trace:
    """The kernels of one call; none where there is no GPU."""
    with tempfile.TemporaryDirectory() as directory:
        record(call, Path(directory))
        try:
            return load(Path(directory))
        except (FileNotFoundError, ValueError):
            return {}


def kernel_microseconds(call: Callable[[], Any], parts: int) -> float | None:
    """Busy time of one of the `parts` equal parts of a call, on the device that is busy least.

    A kernel that waits for a peer is busy, so the device with the least shows the work. None if the
    trace has no GPU.
    """
    busy_times = [busy(kernels) for kernels in traced(call).values()]
    return min(busy_times) / parts / 1e3 if busy_times else None


def classify(name: str) -> str:
    """The class of a kernel by its name."""
    for kind, pattern in CLASSES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return ELEMENTWISE


def attribute(trace: Trace) -> dict[str, dict[str, float]]:
    """Microseconds by class for each device, and "idle gap": nothing ran between first and last.

    Where kernels of two classes overlap, the time goes to the kernel that started first, so that
    the classes add up to the time from first to last.
    """
    devices = {}
    for device, kernels in trace.items():
        times: dict[str, float] = dict.fromkeys(ORDER, 0.0)
        until = kernels[0].start
        for kernel in kernels:
            times[IDLE] += max(0.0, kernel.start - until)
            times[classify(kernel.name)] += max(0.0, kernel.end - max(kernel.start, until))
            until = max(until, kernel.end)
        devices[device] = {kind: time / 1e3 for kind, time in times.items()}
    return devices


def without_waiting(trace: Trace) -> dict[str, float] | None:
    """Microseconds of the WAITING classes with each kernel as short as on the fastest rank.

    None if there is one device, or they ran different numbers of them.
    """
    if len(trace) == 1:
        return None
    times = {}
    for kind in WAITING:
        durations = [
            [kernel.duration for kernel in kernels if classify(kernel.name) == kind]
            for kernels in trace.values()
        ]
        if len({len(device) for device in durations}) > 1:
            return None
        times[kind] = sum(map(min, zip(*durations))) / 1e3
    return times
