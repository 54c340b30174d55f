"""Where the time of a Gemma block goes, with psum and fused, from two jax.profiler traces.

    profile_compare.py              runs a block both ways and compares
    profile_compare.py A B          compares two traces that you took (.xplane.pb, or their folders)

Kernel time goes to classes by kernel name (xplane.CLASSES; the JSON lists the names), on each
device by itself: GPUs work at the same time, and their times are never added. A kernel of an
all-reduce or a fused tail also waits for its peers, so both are shown too as they are on the
fastest rank. Own runs are traced without CUDA graphs, in which kernels are hard to tell apart, and
timed with them. Writes a table, a JSON and a picture: both timelines on one scale, and the sums.
"""

import argparse
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import block
import common
import jax
import report
import xplane

import jax_gemma_arf as jga

RUNS = 3  # of the traced call, back to back


def compare(traces: dict[str, xplane.Trace], parts: int) -> dict[str, Any]:
    """Compares the traces, by label, in microseconds of one of the equal parts of each."""
    result = {}
    for label, trace in traces.items():
        waiting = xplane.without_waiting(trace)
        kinds: dict[str, dict[str, list[float]]] = {}
        for kernel in next(iter(trace.values())):
            names = kinds.setdefault(xplane.classify(kernel.name), {})
            names.setdefault(kernel.name, []).append(kernel.duration / 1e3)
        result[label] = {
            "devices": {
                device: {kind: time / parts for kind, time in times.items()}
                for device, times in xplane.attribute(trace).items()
            },
            "without_waiting": waiting and {kind: time / parts for kind, time in waiting.items()},
            "kernels": {
                kind: [
                    {"name": name, "count": len(times) / parts, "us": sum(times) / parts}
                    for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:12]
                ]
                for kind, names in kinds.items()
            },
        }
    return result


def window(comparison: dict[str, Any], parts: int) -> float:
    """Microseconds of two parts of the slower trace; of traces of unknown parts, some."""
    devices = [next(iter(side["devices"].values())) for side in comparison.values()]
    longest = max(sum(times.values()) for times in devices)
    return 2 * longest if parts > 1 else min(longest / 2, 500.0)


def timeline(
    kernels: list[xplane.Kernel], parts: int, microseconds: float
) -> list[tuple[str, float, float]]:
    """Class, start and duration, in microseconds, of kernels from the start of a part in the middle
    of a trace, for so long."""
    middle = len(kernels) // parts * (parts // 2) if parts > 1 else len(kernels) // 2
    first = kernels[middle].start
    last = first + microseconds * 1e3
    return [
        (xplane.classify(k.name), (k.start - first) / 1e3, (min(k.end, last) - k.start) / 1e3)
        for k in kernels
        if first <= k.start < last
    ]


def work(arguments: argparse.Namespace) -> None:
    """A child's part: traces both implementations, or times them."""
    jga.set_peer_timeout(20)  # what hangs is a failed timing
    bench = block.Bench(arguments)
    facts = {"mode": bench.mode, "ranks": bench.ranks, "layers": bench.layers, "timings": 2}
    common.emit({"facts": facts})
    if bench.mode == "cpu":
        return
    names = list(bench.implementations())
    chosen = [names[0], next(name for name in reversed(names) if name.startswith("fused"))]
    for row, call in bench.cases([arguments.model], [arguments.tokens], chosen):
        if "error" in row:
            pass
        elif arguments.trace_into is None:
            row["layer_us"] = bench.clock.microseconds(call, bench.layers)
        else:
            for _ in range(4):
                jax.block_until_ready(call())
            row["trace"] = str(arguments.trace_into / row["implementation"].replace(" ", "-"))
            xplane.record(functools.partial(repeat, call), Path(row["trace"]))
        common.emit(row)


def repeat(call):
    return [call() for _ in range(RUNS)]


def own_run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Traces a block into folder, and times it: the content of a record."""
    content: dict[str, Any] = {"facts": {}, "rows": [], "notes": []}

    def on_row(row):
        if "facts" in row:
            content["facts"] |= row["facts"]
        else:
            content["rows"].append(row)

    for flags, extra in ((common.NO_COMMAND_BUFFERS, ["--trace-into", str(folder)]), ("", [])):
        failure = common.run_child("A", arguments.child_seconds, on_row, flags, extra)
        content["notes"] += [failure] if failure else []
    return content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, child_seconds=120)
    parser.add_argument("traces", type=Path, nargs="*", help="two traces; default: an own run")
    parser.add_argument("--labels", nargs=2, help="of the two traces; default: their names")
    parser.add_argument(
        "--per",
        type=common.positive_integer,
        default=1,
        help="divide the times of given traces, by their steps say",
    )
    parser.add_argument("--window-us", type=float, help="length of the timelines")
    parser.add_argument("--model", choices=block.MODELS, default="31B")
    parser.add_argument("--tokens", type=common.positive_integer, default=4)
    block.add_layers(parser)
    parser.add_argument("--trace-into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if common.in_child(arguments):
        work(arguments)
        return
    if arguments.window_us is not None and not arguments.window_us > 0:
        parser.error(f"--window-us must be positive, got {arguments.window_us}")
    if len(arguments.traces) not in (0, 2):
        parser.error(f"give two traces or none, got {len(arguments.traces)}")

    with tempfile.TemporaryDirectory() as folder:
        if arguments.traces:
            labels = arguments.labels or [path.name.split(".")[0] for path in arguments.traces]
            content: dict[str, Any] = {"facts": {}, "rows": [], "notes": []}
            content |= {"title": " and ".join(labels), "unit": "part"}
            paths, parts = dict(zip(labels, arguments.traces)), arguments.per
        else:
            content = own_run(arguments, Path(folder))
            content["title"] = f"A block of {arguments.model} at {arguments.tokens} tokens"
            content["unit"] = "layer"
            rows = content["rows"]
            paths = {row["implementation"]: row.pop("trace") for row in rows if "trace" in row}
            parts = RUNS * content["facts"].get("layers", 0)
            if content["facts"].get("mode") == "cpu":
                print("no GPU here, so there is nothing to trace; two traces can be compared")
                return
            if len(paths) < 2:
                failures = [row["error"] for row in rows if "error" in row]
                sys.exit("\n".join(["there is no trace of both", *content["notes"], *failures]))
        try:
            traces = {label: xplane.load(Path(path)) for label, path in paths.items()}
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if len(traces) < 2:
        parser.error("the traces must have different names; give --labels")

    comparison = compare(traces, parts)
    microseconds = arguments.window_us or window(comparison, parts)
    timelines = {
        label: timeline(next(iter(trace.values())), parts, microseconds)
        for label, trace in traces.items()
    }
    content |= {"labels": [*traces], "comparison": comparison}
    content |= {"timelines": timelines, "window_us": microseconds}
    report.finish("profile", content, arguments.out)


if __name__ == "__main__":
    main()
