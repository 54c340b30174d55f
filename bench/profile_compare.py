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
import xplane
from report import COLORS

RUNS = 3  # of the traced call, back to back


def compare(traces: dict[str, xplane.Trace], parts: int) -> dict[str, Any]:
    """What the traces say, by label; microseconds of one of the equal parts of each."""
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


def markdown(result: dict[str, Any], walls: dict[str, common.Spread]) -> str:
    """One column for each device of each trace."""
    columns = [(label, device) for label, side in result.items() for device in side["devices"]]
    rows = []

    def add(title, cell):
        cells = [cell(label, device) for label, device in columns]
        rows.append([title, *("" if us is None else f"{us:.1f}" for us in cells)])

    for kind in xplane.ORDER:
        add(kind, lambda label, device, kind=kind: result[label]["devices"][device][kind])
        if kind in xplane.WAITING:
            add(
                f"{kind}, least over ranks",
                lambda label, _, kind=kind: (result[label]["without_waiting"] or {}).get(kind),
            )
    add("**sum**", lambda label, device: sum(result[label]["devices"][device].values()))
    if walls:
        rows.append(["wall time, with CUDA graphs", *(str(walls[label]) for label, _ in columns)])
    header = ["us", *(f"{label}, {device.removeprefix('/device:')}" for label, device in columns)]
    return common.table(header, rows)


def window(kernels: list[xplane.Kernel], parts: int, microseconds: float) -> list[xplane.Kernel]:
    """Kernels from the start of a part in the middle of a trace, for so long."""
    per_part = max(1, len(kernels) // parts)
    first = (
        kernels[per_part * (parts // 2)].start if parts > 1 else kernels[len(kernels) // 2].start
    )
    last = first + microseconds * 1e3
    return [
        xplane.Kernel(k.name, (k.start - first) / 1e3, (min(k.end, last) - first) / 1e3)
        for k in kernels
        if first <= k.start < last
    ]


def plot(
    path: Path,
    title: str,
    traces: dict[str, xplane.Trace],
    parts: int,
    result: dict[str, Any],
    walls: dict[str, common.Spread],
    unit: str,
    microseconds: float | None,
) -> None:
    """Timelines of the first device on one scale, over stacked bars of the same device.

    unit: what one of the parts is; microseconds: the length of the timelines, None for two parts.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    sums = {label: next(iter(side["devices"].values())) for label, side in result.items()}
    if microseconds is None:  # two parts of the slower one; of a trace of unknown parts, some
        longest = max(sum(times.values()) for times in sums.values())
        microseconds = 2 * longest if parts > 1 else min(longest / 2, 500.0)

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    timeline, bars = figure.subplots(2, 1, height_ratios=(1, 1.15))
    for axes in (timeline, bars):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.tick_params(axis="x", labelsize=9)
        axes.set_yticks(range(len(traces)), traces)
        axes.set_ylim(len(traces) - 0.45, -0.55)
    figure.suptitle(title, x=0.008, ha="left", fontsize=13, fontweight="bold")

    for y, trace in enumerate(traces.values()):
        kernels = next(iter(trace.values()))
        for kernel in window(kernels, parts, microseconds):
            timeline.broken_barh(
                [(kernel.start, kernel.duration)],
                (y - 0.32, 0.64),
                color=COLORS[xplane.classify(kernel.name)],
                linewidth=0,
            )
    timeline.set_xlim(0, microseconds)
    timeline.set_xlabel("us of one GPU's time; white is idle", fontsize=9)

    for y, (label, times) in enumerate(sums.items()):
        left = 0.0
        working = result[label]["without_waiting"] or {}
        for kind in xplane.ORDER:
            width = times[kind]
            if width == 0:
                continue
            edge = {"edgecolor": "#bbbbbb" if kind == xplane.IDLE else "white", "linewidth": 0.8}
            bars.barh(y, width, left=left, height=0.62, color=COLORS[kind], **edge)
            waits = width - min(width, working.get(kind, width))
            if waits > 0.01 * width:
                bars.barh(
                    y, waits, left=left + width - waits, height=0.62, fill=False, hatch="////",
                    edgecolor="white", linewidth=0,
                )  # fmt: skip
            if width > 0.045 * max(map(sum, (t.values() for t in sums.values()))):
                dark = kind in ("all-reduce", "fused tail")
                bars.text(
                    left + width / 2, y, f"{width:.1f}", ha="center", va="center", fontsize=10,
                    color="white" if dark else "#333333",
                )  # fmt: skip
            left += width
        wall = f"   (wall, in CUDA graphs: {walls[label]})" if label in walls else ""
        bars.text(left, y, f"  {left:.1f}{wall}", va="center", fontsize=10)
    bars.set_xlim(0, 1.32 * max(sum(times.values()) for times in sums.values()))
    bars.set_xlabel(
        f"us a {unit}, kernel by kernel; hatched: more than the fastest rank needed", fontsize=9
    )
    shown = [kind for kind in xplane.ORDER if any(times[kind] for times in sums.values())]
    handles = [Patch(facecolor=COLORS[kind], edgecolor="#bbbbbb", linewidth=0.4) for kind in shown]
    figure.legend(handles, shown, loc="upper right", ncols=len(shown), frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=160, facecolor="white")


def work(arguments: argparse.Namespace) -> None:
    """A child's part: traces both implementations, or times them."""
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
            folder = arguments.trace_into / str(row["implementation"]).replace(" ", "-")
            xplane.record(functools.partial(repeat, call), folder)
            row["trace"] = str(folder)
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
    content["notes"] += [row["error"] for row in content["rows"] if "error" in row]
    return content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, child_seconds=120)
    parser.add_argument("traces", type=Path, nargs="*", help="two traces; default: an own run")
    parser.add_argument("--labels", nargs=2, help="of the two traces; default: their names")
    parser.add_argument(
        "--per", type=int, default=1, help="divide the times of given traces, by their steps say"
    )
    parser.add_argument("--window-us", type=float, help="length of the timelines")
    parser.add_argument("--model", choices=block.MODELS, default="31B")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--trace-into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if common.in_child(arguments):
        work(arguments)
        return
    if len(arguments.traces) not in (0, 2):
        parser.error(f"give two traces or none, got {len(arguments.traces)}")

    walls: dict[str, common.Spread] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.traces:
            content: dict[str, Any] = {"facts": {}, "rows": [], "notes": []}
            labels = arguments.labels or [path.name.split(".")[0] for path in arguments.traces]
            paths = dict(zip(labels, arguments.traces))
            parts = arguments.per
            title = " and ".join(labels)
        else:
            content = own_run(arguments, Path(folder))
            for note in content["notes"]:
                print(note)
            if content["facts"].get("mode") in ("cpu", None):
                print("no GPU here, so there is nothing to trace; two traces can be compared")
                return
            rows = content["rows"]
            paths = {row["implementation"]: Path(row["trace"]) for row in rows if "trace" in row}
            parts = RUNS * content["facts"]["layers"]
            title = f"A block of {arguments.model} at {arguments.tokens} tokens"
            for row in rows:
                if "layer_us" in row:
                    walls[row["implementation"]] = common.summarize(row["layer_us"])
        traces = {label: xplane.load(path) for label, path in paths.items()}
        if len(traces) < 2:
            sys.exit("there must be two traces of different names; see above, or give --labels")

    result = compare(traces, parts)
    path = common.write_record("profile", content | {"comparison": result}, arguments.out)
    print(f"## {title}\n\n{markdown(result, walls)}\n")
    picture = path.with_suffix(".png")
    unit = "part" if arguments.traces else "layer"
    plot(picture, title, traces, parts, result, walls, unit, arguments.window_us)
    print(f"{path}\n{picture}")


if __name__ == "__main__":
    main()
