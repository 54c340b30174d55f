"""Shared code of the benchmarks: timing with its spread, child processes, records, machine facts.

A record is one JSON file for one run: where and of what it was taken, and raw samples, from which
report.py makes tables and plots.
"""

import argparse
import collections
import concurrent.futures
import datetime
import importlib.metadata
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jax_gemma_arf as jga

REPOSITORY = Path(__file__).parent.parent
#: Twice the largest L2 among the supported GPUs (B200: 126 MB): streaming it leaves nothing behind.
FLUSH_BYTES = 256 << 20

#: XLA's best without this library: XLA_FLAGS for psum, each set in a process of its own.
FLAG_SETS = {
    "A": "",
    "B": "--xla_gpu_disable_async_collectives=ALLREDUCE",
    "C": "--xla_gpu_experimental_use_collective_kernels= "
    "--xla_gpu_enable_command_buffer=+COLLECTIVES "
    "--xla_gpu_enable_collectives_command_buffer_filter=ALLREDUCE "
    "--xla_gpu_graph_min_graph_size=1",
}
FLAG_SETS["D"] = FLAG_SETS["C"] + " --xla_gpu_experimental_enable_nccl_symmetric_buffers=true"
#: XLA_FLAGS under which every kernel is launched, and traced, by itself.
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


class Spread(NamedTuple):
    """Samples of one quantity: their median, and half their interquartile range."""

    median: float
    spread: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ± {self.spread:.1f}"


def summarize(samples: Sequence[float]) -> Spread:
    """The median and half the interquartile range of one or more samples."""
    if len(samples) == 1:
        return Spread(samples[0], 0.0)
    low, _, high = statistics.quantiles(samples, n=4)
    return Spread(statistics.median(samples), (high - low) / 2)


def differ(one: Spread, two: Spread) -> bool:
    """Returns whether the medians are further apart than their spreads reach."""
    return abs(one.median - two.median) > one.spread + two.spread


_touch = jax.jit(lambda pool: pool + 1, donate_argnums=0)


def _on_every_device(mesh: jax.sharding.Mesh, make: Callable, shape: Any, dtype: Any) -> jax.Array:
    """jnp.zeros or jnp.ones, made where its parts lie: the first axis is split over the mesh."""
    sharding = jax.NamedSharding(mesh, P(mesh.axis_names))
    return jax.jit(make, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)


class Clock:
    """Times compiled functions on a mesh, with cold caches.

    Between calls every device streams FLUSH_BYTES, so that what a call reads comes from memory;
    the time of the flush, measured alone, is taken off.
    """

    def __init__(self, mesh: jax.sharding.Mesh, repeats: int = 15, runs: int = 5):
        self.repeats, self.runs = repeats, runs
        self._pool = None
        if mesh.devices.flat[0].platform != "gpu":  # where times mean little
            self.repeats, self.runs = min(repeats, 3), 2
        else:
            count = mesh.size * FLUSH_BYTES // 4
            self._pool = _on_every_device(mesh, jnp.zeros, count, jnp.int32)
            self._flush_seconds = statistics.median(self._seconds(None) for _ in range(2 * repeats))

    def _seconds(self, call: Callable[[], Any] | None) -> float:
        """Times self.runs calls with a flush before each; without a call, the flushes alone."""
        out = None
        start = time.perf_counter()
        for _ in range(self.runs):
            if self._pool is not None:
                self._pool = _touch(self._pool)
            if call is not None:
                out = None  # freed first, so that the next output takes its place in CUDA graphs
                out = call()
        jax.block_until_ready((out, self._pool))
        return time.perf_counter() - start

    def flush(self) -> None:
        """Leaves nothing of use in the caches."""
        if self._pool is not None:
            self._pool = jax.block_until_ready(_touch(self._pool))

    def microseconds(self, call: Callable[[], Any], parts: int) -> list[float]:
        """Samples of the time of one of the `parts` equal parts that a call consists of."""
        return self.in_turn([call], parts)[0]

    def in_turn(self, calls: Sequence[Callable[[], Any]], parts: int) -> list[list[float]]:
        """Samples of each of several calls, one of each at a time, so that all see one drift."""
        for call in [*calls] * 4:  # compiled and loaded, run eagerly, captured, replayed
            jax.block_until_ready(call())
        flush = 0.0 if self._pool is None else self._flush_seconds
        samples: list[list[float]] = [[] for _ in calls]
        for _ in range(self.repeats):
            for call, taken in zip(calls, samples):
                taken.append((self._seconds(call) - flush) / (self.runs * parts) * 1e6)
        return samples


def start(
    pool: concurrent.futures.Executor, lower: Callable[[], jax.stages.Lowered]
) -> concurrent.futures.Future:
    """Lowers, here and now, and starts to compile. What goes wrong is the future's."""
    try:
        return pool.submit(lower().compile)
    except Exception as error:
        failed = concurrent.futures.Future()
        failed.set_exception(error)
        return failed


def _least_seconds(run: Callable[[], Any]) -> float:
    """The time of the fastest of six runs."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def copy_bandwidth(mesh: jax.sharding.Mesh) -> float:
    """Bytes a second that one device moves, read plus written, streaming a gigabyte."""
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    count = (1 << 30 if on_gpu else 1 << 26) // 4
    pool = _on_every_device(mesh, jnp.zeros, mesh.size * count, jnp.int32)

    def copies():
        nonlocal pool
        for _ in range(10):
            pool = _touch(pool)
        return pool

    return 10 * 8 * count / _least_seconds(copies)


def matmul_rate(mesh: jax.sharding.Mesh) -> float:
    """Operations a second of one device in large bfloat16 matmuls, with all devices at work."""
    size = 8192 if mesh.devices.flat[0].platform == "gpu" else 256
    a = _on_every_device(mesh, jnp.ones, (mesh.size, size, size), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: a @ b)
    return 4 * 2 * size**3 / _least_seconds(lambda: [multiply(a, a) for _ in range(4)])


def machine() -> dict[str, Any]:
    """Where a record was taken, without starting JAX: GPUs, driver, versions, commit, settings."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        command.append(f"--id={visible}")
    gpus = [line.split(", ") for line in _output(*command)]
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-nccl-cu13", "numpy")
    return {
        "gpus": [gpu[0] for gpu in gpus],
        "driver": gpus[0][1] if gpus else None,
        "cpus": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": {name: version for name in names if (version := _version(name))},
        "commit": os.environ.get("COMMIT") or _commit(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("XLA_", "NCCL_", "JAX_", "CUDA_VISIBLE"))
        },
    }


def _output(*command: str) -> list[str]:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    except (OSError, subprocess.CalledProcessError):
        return []
    return result.stdout.splitlines()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD, with a + where the working tree differs from it."""
    head = _output("git", "rev-parse", "--short=10", "HEAD")
    if not head:
        return None
    return head[0] + ("+" if _output("git", "status", "--porcelain", "-uno") else "")


def write_record(kind: str, content: dict[str, Any], directory: Path) -> Path:
    """Writes {kind, created, machine, **content} into a file of its own; returns its path."""
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%SZ")
    record = {"kind": kind, "created": created, "machine": machine(), **content}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{kind}-{created}.json"
    save(record, path)
    return path


def save(record: dict[str, Any], path: Path) -> None:
    """Writes a record as JSON."""
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def positive_integer(text: str) -> int:
    """Parses a command-line option that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser, *, child_seconds: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="few sizes, few repeats: < 60 s")
    parser.add_argument("--ranks", type=int, default=0, help="0: all GPUs, or 2 in loopback")
    parser.add_argument(
        "--repeats", type=positive_integer, default=15, help="samples of each timing"
    )
    parser.add_argument(
        "--child-seconds",
        type=positive_integer,
        default=child_seconds,
        help="time limit of each process",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or REPOSITORY / "bench" / "records"),
        help="folder of the record; default: $OUT, else bench/records",
    )
    # For the processes that a benchmark starts itself.
    parser.add_argument("--flag-set", choices=FLAG_SETS, help=argparse.SUPPRESS)


def in_child(arguments: argparse.Namespace) -> bool:
    """Returns whether run_children started this process."""
    return arguments.flag_set is not None


def emit(row: dict[str, Any]) -> None:
    """Hands a row from a child to run_children."""
    print(json.dumps(row), flush=True)


class Bench:
    """The devices of a benchmark, on which subclasses take the facts() and rows() of a record."""

    def __init__(self, arguments: argparse.Namespace, one_gpu: str = "loopback"):
        mode, self.devices = devices_for(arguments.ranks)
        self.mode = one_gpu if mode == "loopback" else mode
        self.ranks = (arguments.ranks or 2) if self.mode == "loopback" else len(self.devices)
        self.mesh = tp_mesh(self.devices)
        self.flag_set = arguments.flag_set
        self.arguments = arguments


def work(make_bench: Callable[[argparse.Namespace], Any], arguments: argparse.Namespace) -> None:
    """Emits what a benchmark has under one flag set, in a child process."""
    jax.config.update("jax_num_cpu_devices", 8)
    jga.set_peer_timeout(20)  # what hangs is a failed timing
    bench = make_bench(arguments)
    device = bench.mesh.devices.flat[0].device_kind
    emit({"facts": {"mode": bench.mode, "ranks": bench.ranks, "device": device} | bench.facts()})
    for row in bench.rows():
        emit(row)


def failure(error: Exception) -> dict[str, str]:
    """The field of a row that could not be timed, which is a result, too."""
    return {"error": f"{type(error).__name__}: {error}"[:500]}


def run_child(
    flag_set: str,
    seconds: float,
    on_row: Callable[[dict[str, Any]], None],
    extra_flags: str = "",
    extra_arguments: Sequence[str] = (),
) -> str | None:
    """Runs this script again with its arguments and a flag set; what went wrong, or None.

    Each row that the child emits goes to on_row. A child that is not done in time is killed; the
    rows until then count.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG_SETS[flag_set]} {extra_flags}".strip()
    # NVLink multicast is opt-in (export NCCL_NVLS_ENABLE=1): on shared hosts it can take GPUs down.
    # The rivals' memory lies outside JAX's pool.
    environment = {"NCCL_NVLS_ENABLE": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6", **os.environ}
    last_words: collections.deque[str] = collections.deque(maxlen=20)
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *sys.argv, *extra_arguments, "--flag-set", flag_set],
        env=environment | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        listener = threading.Thread(target=last_words.extend, args=(process.stderr,))
        listener.start()
        watchdog = threading.Timer(seconds, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    on_row(json.loads(line))
            process.wait()
        finally:  # also where this process is told to stop
            process.kill()
            watchdog.cancel()
            listener.join()
    if process.returncode == 0:
        return None
    if time.monotonic() - start >= seconds:
        return f"flag set {flag_set}: stopped after {seconds:.0f} s"
    return f"flag set {flag_set}: exit status {process.returncode}: " + "".join(last_words)[-2000:]


def run_children(
    flag_sets: Sequence[str],
    arguments: argparse.Namespace,
    label: str,
    variants: Sequence[Sequence[str]] = ((),),
) -> dict[str, Any]:
    """Runs this script once for each variant and flag set, "A" first, under a progress bar.

    Flag sets other than "A" are for psum over a mesh of GPUs, and only run there. label: a format
    string for the bar, of a row's keys. variants: more arguments, one list for each.

    Returns:
      The content of a record: facts (of the first child that gave each), rows, notes (what was left
      out or went wrong). What there is by then if this process is interrupted or terminated.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tqdm(unit=" timings", dynamic_ncols=True, disable=None) as bar:

        def on_row(row):
            if "facts" in row:
                bar.total = (bar.total or 0) + row["facts"]["timings"]
                facts.update({key: x for key, x in row["facts"].items() if key not in facts})
                return
            if "note" in row:
                notes.append(row["note"])
                return
            if "progress" in row:
                bar.write(row["progress"], file=sys.stderr)
                return
            rows.append(row)
            bar.set_postfix_str(label.format(**row))
            bar.update()

        try:
            ordered = ("A", *(name for name in flag_sets if name != "A"))
            for extra, flag_set in itertools.product(variants, ordered):
                if flag_set == "A" or facts.get("mode") == "mesh":
                    bar.set_description(" ".join([*extra[1:], f"flag set {flag_set}"]))
                    failure = run_child(
                        flag_set, arguments.child_seconds, on_row, extra_arguments=extra
                    )
                    if failure:
                        notes.append(" ".join([*extra[1:], failure]))
        except KeyboardInterrupt:
            notes.append("stopped before the end")
    return {"facts": facts, "flag_sets": FLAG_SETS, "rows": rows, "notes": notes}


def devices_for(ranks: int) -> tuple[str, list[Any]]:
    """The mode, "mesh", "loopback" or "cpu", and its devices; ranks 0 means all there are."""
    found = jax.devices()
    if found[0].platform == "gpu":
        if len(found) == 1:
            return "loopback", found
        return "mesh", found[: ranks or len(found)]
    return "cpu", jax.devices("cpu")[: ranks or 2]


def tp_mesh(devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The devices along one axis, "tp", in Auto mode."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("tp",), axis_types=auto, devices=devices)


def rank_sum(x: jax.Array) -> jax.Array:
    """[N, tokens, D] summed in float32, rounded once."""
    return x.astype(jnp.float32).sum(0).astype(x.dtype)


@jax.jit
def _relative_error(out: jax.Array, want: jax.Array) -> jax.Array:
    out, want = out.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm(out - want) / jnp.linalg.norm(want)


def relative_error(out: jax.Array, want: jax.Array) -> float:
    """||out - want|| / ||want||."""
    return float(_relative_error(out, want))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grouped(rows: Sequence[Any], *keys: str) -> dict[Any, list[Any]]:
    """Rows by the value of a key, or the tuple of several, in order of first appearance."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return groups
