"""Makes Markdown tables and plots from records: ``report.py RECORD.json... [--out FOLDER]``."""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import xplane
from common import Spread

Record = dict[str, Any]
#: Right ends of lines: x, y, label, colour.
Ends = list[tuple[float, float, str, str]]

#: One colour for one thing, in all plots.
COLORS = {
    "fused": "#0b62d6",
    "fused sandwich": "#0a3a80",
    "psum": "#c8372d",
    "official, one GPU": "#555555",
    "official, partitioned": "#e08e0b",
    "official": "#e08e0b",
    "flashinfer norm + tail": "#e08e0b",
    "sum": "#c8372d",
    "floor": "#7a7a7a",
    "matmul": "#b9c6d3",
    "all-reduce": "#c8372d",
    "norm and elementwise": "#f0b08a",
    "fused tail": "#0b62d6",
    "idle gap": "#f3f3f0",
}
#: Of the widths, in order.
SHADES = ("#9cc4f5", "#5a9bea", "#0b62d6", "#0a3a80")
LABELS = {
    "psum": "psum + tail",
    "sum": "sum + tail, no collective",
    "fused": "fused",
    "fused flashinfer": "fused, FlashInfer's kernel",
    "flashinfer norm + tail": "FlashInfer norm + XLA tail",
    "flashinfer all-reduce": "FlashInfer all-reduce",
    "wire": "wire",
}


#: Implementations of a whole model, in the order in which tables show them.
MODEL_ORDER = ("official, one GPU", "official, partitioned", "official", "psum", "fused")
#: Fields of rows with an error, and what they are of.
MODEL_ERRORS = {
    "relative_error": "logits",
    "token_error": "sampled tokens",
    "loss_error": "losses",
    "norm_error": "norms of gradients",
}


class Timing(NamedTuple):
    """One implementation's line. flag_set: the one whose wall time was best."""

    wall: Spread
    kernel: float | None
    flag_set: str


#: Timings by implementation, by the tokens or batch of a line.
Lines = dict[int, dict[str, Timing]]


def read(path: Path) -> Record:
    """A record, with its name."""
    return json.loads(path.read_text()) | {"name": path.stem}


def headline(record: Record) -> str:
    """Where a record was taken, and of what."""
    machine, facts = record["machine"], record["facts"]
    where = f"{len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else "CPU"
    mode = {
        "mesh": f"{facts.get('ranks')} ranks",
        "loopback": f"loopback: {facts.get('ranks')} ranks share one GPU, no wire",
        "single": "one GPU, so there is nothing to reduce",
        "cpu": f"{facts.get('ranks')} virtual CPU ranks, for trying out only",
    }.get(facts.get("mode", ""), "no device came up")
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    versions = machine["versions"]
    return (
        f"{where}{driver}, jax {versions.get('jax')}, commit {machine['commit']}, "
        f"{record['created'][:10]}; {mode}"
    )


def best(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Timing]:
    """The best flag set of each implementation among rows of one line; wrong results left out.

    key: the field with the samples.
    """
    timings: dict[str, Timing] = {}
    for row in rows:
        if key not in row or row.get("matches") is False:
            continue
        timing = Timing(common.summarize(row[key]), row.get("kernel_us"), row["flag_set"])
        name = row["implementation"]
        if name not in timings or timing.wall < timings[name].wall:
            timings[name] = timing
    return timings


def faster(base: Timing | None, other: Timing | None) -> str:
    """base / other, or that they do not differ."""
    if base is None or other is None:
        return ""
    if not common.differ(base.wall, other.wall):
        return "as fast"
    return f"{base.wall.median / other.wall.median:.2f}"


def second_norm(rows: Sequence[dict[str, Any]]) -> Spread | None:
    """Cost of a next norm in a call, in microseconds, from the rows of one line.

    Sample by sample, since fused_post_ff and fused_sandwich were timed in turn.
    """
    samples = {
        row["implementation"]: row["wall_us"]
        for row in rows
        if row["op"] == "second_norm" and "wall_us" in row and row["matches"]
    }
    if len(samples) < 2:
        return None
    pairs = zip(samples["fused_sandwich"], samples["fused_post_ff"])
    return common.summarize([sandwich - post_ff for sandwich, post_ff in pairs])


def best_of_lines(rows: Sequence[dict[str, Any]], field: str, key: str) -> Lines:
    """Returns `best` of each line, the rows of one value of a field, by that value."""
    return {value: best(line, key) for value, line in common.grouped(rows, field).items()}


def op_markdown(record: Record) -> str:
    """Two tables, wall and kernel time, for each operation and width."""
    parts = [f"## Operations\n\n{headline(record)}"]
    for (op, width), rows in common.grouped(record["rows"], "op", "hidden").items():
        lines = best_of_lines(rows, "tokens", "wall_us")
        names = list(dict.fromkeys(name for line in lines.values() for name in line))
        fused = [name for name in names if name in ("fused", "fused flashinfer")]
        more = {}
        if op == "second_norm":
            costs = {n: second_norm(line) for n, line in common.grouped(rows, "tokens").items()}
            more["second norm: fused_sandwich - fused_post_ff"] = {
                n: f"{cost.median:.2f} ± {cost.spread:.2f}" for n, cost in costs.items() if cost
            }
        brackets = "; in brackets psum's best flag set" if "psum" in names else ""
        parts.append(
            f"### {op}, D = {width}\n\nWall time, us a call{brackets}.\n\n"
            + _wall_table(lines, names, fused, more)
        )
        if any(timing.kernel for line in lines.values() for timing in line.values()):
            kernel = []
            for tokens, line in lines.items():
                cells = [_kernel(name, line.get(name), tokens, width, record) for name in names]
                kernel.append([str(tokens), *cells])
            header = ["tokens", *(LABELS.get(name, name) for name in names)]
            parts.append("Kernel time, us a call.\n\n" + common.table(header, kernel))
    return "\n\n".join([*parts, *_troubles(record)])


def _wall_table(
    lines: Lines,
    names: Sequence[str],
    fused: Sequence[str],
    more: dict[str, dict[int, str]],
) -> str:
    """Wall times by tokens, speed-ups of the fused ones, and more columns by their titles."""
    base = "sum" if "sum" in names else "psum"
    header = ["tokens", *(LABELS.get(name, name) for name in names)]
    header += [*(f"{base} / {LABELS.get(name, name)}" for name in fused), *more]
    rows = [
        [
            str(tokens),
            *(_wall(line.get(name), base == name == "psum") for name in names),
            *(faster(line.get(base), line.get(name)) for name in fused),
            *(column.get(tokens, "") for column in more.values()),
        ]
        for tokens, line in lines.items()
    ]
    return common.table(header, rows)


def _wall(timing: Timing | None, with_flags: bool) -> str:
    if timing is None:
        return ""
    return str(timing.wall) + (f" [{timing.flag_set}]" if with_flags else "")


def _kernel(name: str, timing: Timing | None, tokens: int, width: int, record: Record) -> str:
    if timing is None or timing.kernel is None:
        return ""
    if name != "wire":
        return f"{timing.kernel:.1f}"
    ranks = record["facts"]["ranks"]
    sent = 2 * (ranks - 1) / ranks * 2 * tokens * width
    return f"{timing.kernel:.1f} ({sent / timing.kernel / 1e3:.0f} GB/s)"


def _troubles(record: Record) -> list[str]:
    """Lists the rows that failed or were wrong, and the notes on what was left out."""
    wrong = [row for row in record["rows"] if row.get("matches") is False]
    failed = [row for row in record["rows"] if "error" in row]
    lines = [f"WRONG RESULT: {_identity(row)}" for row in wrong]
    lines += [f"failed: {_identity(row)}: {row['error']}" for row in failed]
    lines += record["notes"]
    if "not built" in str(record["facts"].get("rivals")):
        lines.append(f"FlashInfer and the wire: {record['facts']['rivals']}")
    return ["\n".join(f"- {line.strip()}" for line in lines)] if lines else []


def _identity(row: dict[str, Any]) -> str:
    keys = ("op", "model", "phase", "batch", "implementation", "flag_set", "hidden", "tokens")
    return ", ".join(f"{key} {row[key]}" for key in keys if key in row)


def block_markdown(record: Record) -> str:
    """One table for each model: microseconds a layer."""
    facts = record["facts"]
    parts = [
        f"## Blocks\n\n{headline(record)}; {facts.get('layers')} layers; copies run at "
        f"{facts.get('bandwidth', 0) / 1e12:.2f} TB/s"
    ]
    for model, rows in common.grouped(record["rows"], "model").items():
        lines = best_of_lines(rows, "tokens", "layer_us")
        names = list(dict.fromkeys(name for line in lines.values() for name in line))
        fused = [name for name in names if name.startswith("fused")]
        gaps = dict.fromkeys(row["implementation"] for row in rows if row.get("gap_us") is not None)
        more = {f"gap, {name}": {n: _gap(rows, n, name) for n in lines} for name in gaps}
        parts.append(
            f"### {model}\n\nWall time, us a layer; its weights alone need "
            f"{facts['weights_us'][model]:.1f}.\n\n" + _wall_table(lines, names, fused, more)
        )
    return "\n\n".join([*parts, *_troubles(record)])


def _gap(rows: Sequence[dict[str, Any]], tokens: int, name: str) -> str:
    """The gap in front of a tail, in a profile."""
    for row in rows:
        gap = row.get("gap_us")
        if row["tokens"] == tokens and row["implementation"] == name and gap is not None:
            return f"{gap:.2f}"
    return "-"


def model_markdown(record: Record) -> str:
    """Two tables for each model: microseconds a step, and what a profile of the decodes says."""
    facts = record["facts"]
    title = {"model": "Whole models", "tunix": "Models of google-tunix"}[record["kind"]]
    parts = [
        f"## {title}\n\n{headline(record)}; random weights; a prompt and cache of "
        f"{facts.get('prompt')} tokens"
    ]
    for model, rows in common.grouped(record["rows"], "model").items():
        timed = {row["implementation"] for row in rows if "step_us" in row}
        names = [name for name in MODEL_ORDER if name in timed]
        ours = "fused" if "fused" in names else "psum"
        rivals = [name for name in names if name != ours]
        with_floor = any("floor_us" in row for row in rows)
        cells = []
        for (phase, batch, tokens), line in common.grouped(
            rows, "phase", "batch", "tokens"
        ).items():
            best_of = best(line, "step_us")
            cells.append(
                [
                    f"{phase}, batch {batch}",
                    *(_wall(best_of.get(name), False) for name in names),
                    *([_floor(line)] if with_floor else []),
                    *(faster(best_of.get(name), best_of.get(ours)) for name in rivals),
                    _rate(best_of.get(ours), tokens),
                ]
            )
        header = ["us a step", *names, *["floor"] * with_floor]
        header += [*(f"{name} / {ours}" for name in rivals), f"{ours}, tokens/s"]
        remarks = ["Wall time", *["the floor of each GPU of the mesh"] * with_floor]
        for key, what in MODEL_ERRORS.items():
            if errors := [row[key] for row in rows if key in row]:
                remarks.append(f"{what} differ by {max(errors):.1%} at most")
        parts.append(
            f"### {model}\n\n{_size_of(facts.get(model))}{'; '.join(remarks)}.\n\n"
            + common.table(header, cells)
        )
        if profiles := [row for row in rows if "shares" in row]:
            parts.append("Profiles of the decodes, on one GPU.\n\n" + _shares(profiles))
    return "\n\n".join([*parts, *_troubles(record)])


def _size_of(model: dict[str, Any] | None) -> str:
    if model is None:
        return ""
    size = f"{model['layers']} layers, D = {model['hidden']}"
    if "bandwidth" in model:
        size += (
            f"; copies run at {model['bandwidth'] / 1e12:.2f} TB/s, matmuls at "
            f"{model['matmul_rate'] / 1e12:.0f} TFLOP/s"
        )
    return size + ". "


def _floor(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the floor of one line, on most ranks; in brackets with every expert read."""
    rows = [row for row in rows if "floor_us" in row]
    if not rows:
        return ""
    row = max(rows, key=lambda row: row["ranks"])
    every = row.get("floor_all_experts_us", row["floor_us"])
    return f"{row['floor_us']:.0f}" + (f" [{every:.0f}]" if every > row["floor_us"] else "")


def _shares(rows: Sequence[dict[str, Any]]) -> str:
    """Table of kernels a step, the share of each class, and how many overlap."""
    cells = [
        [
            f"{row['implementation']}, batch {row['batch']}",
            f"{row['kernels']:.0f}",
            f"{row['profiled_us']:.0f}",
            *(f"{row['shares'][kind]:.0%}" for kind in xplane.ORDER),
            f"{row['overlap']:.0%}" if "overlap" in row else "",
        ]
        for row in rows
    ]
    head = ["", "kernels a step", "us a step, profiled", *xplane.ORDER, "kernels that overlap"]
    return common.table(head, cells)


def _rate(timing: Timing | None, tokens: int) -> str:
    """Tokens a second; tokens: of one step."""
    if timing is None:
        return ""
    rate = tokens / timing.wall.median * 1e6
    return str(Spread(rate, rate * timing.wall.spread / timing.wall.median))


def profile_markdown(record: Record) -> str:
    """One column for each device of each trace."""
    sides, walls = _sides(record), _walls(record)
    columns = [(label, device) for label, side in sides.items() for device in side["devices"]]
    rows = []

    def add(title, cell):
        cells = [cell(label, device) for label, device in columns]
        rows.append([title, *("" if us is None else f"{us:.1f}" for us in cells)])

    for kind in xplane.ORDER:
        add(kind, lambda label, device, kind=kind: sides[label]["devices"][device][kind])
        if kind in xplane.WAITING and any(side["without_waiting"] for side in sides.values()):
            add(
                f"{kind}, least over ranks",
                lambda label, _, kind=kind: (sides[label]["without_waiting"] or {}).get(kind),
            )
    add("**sum**", lambda label, device: sum(sides[label]["devices"][device].values()))
    if walls:
        rows.append(["wall time, with CUDA graphs", *(str(walls[label]) for label, _ in columns)])
    header = [
        f"us a {record['unit']}",
        *(f"{label}, {device.removeprefix('/device:')}" for label, device in columns),
    ]
    parts = [f"## {record['title']}{_headline_of_own_run(record)}", common.table(header, rows)]
    return "\n\n".join([*parts, *_troubles(record)])


def _sides(record: Record) -> dict[str, Any]:
    """Returns the results of profile_compare.compare, in the order of the traces."""
    return {label: record["comparison"][label] for label in record["labels"]}


def _walls(record: Record) -> dict[str, Spread]:
    """Returns the times of a profile's own runs in CUDA graphs."""
    rows = [row for row in record["rows"] if "layer_us" in row]
    return {row["implementation"]: common.summarize(row["layer_us"]) for row in rows}


def _headline_of_own_run(record: Record) -> str:
    """Empty for traces that were given."""
    return f"\n\n{headline(record)}" if record["facts"] else ""


def _panels(width: float, height: float, rows: int, columns: int, **ratios: Any):
    """A figure of that many inches, and its panels in reading order."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **ratios).ravel()


def _save(figure, footer: str, path: Path) -> None:
    figure.text(0.005, -0.03, footer, fontsize=8, color="#777777")
    figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white")


def _panel(axes, title: str, ylabel: str) -> None:
    """The look of every panel: light, with a title for the y axis at the top left."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=22)
    axes.text(0, 1.02, ylabel, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, length=3)


def _token_axis(axes, tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens], rotation=45 if len(tokens) > 8 else 0)
    axes.minorticks_off()
    axes.set_xlabel("tokens", fontsize=9)


def _microsecond_axis(axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: PLC0415

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    axes.minorticks_off()


def _curve(axes, ends: Ends, points: Sequence[tuple], label: str, color: str, **style: Any) -> None:
    """Draws a line through (x, y), and adds its right end to what _label_ends takes."""
    if points:
        x, y = zip(*points)
        axes.plot(x, y, color=color, markersize=4, **style)
        ends.append((x[-1], y[-1], label, color))


def _label_ends(axes, ends: Ends) -> None:
    """Names lines at their right ends, apart where they would meet."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [to_axes.transform((x, y))[1] for x, y, _, _ in ends]
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + 0.062) if heights else height)
    shift = sum(heights) / len(heights) - sum(wanted) / len(wanted) if ends else 0
    for (x, y, label, color), height in zip(ends, heights):
        axes.annotate(
            label,
            xy=(x, y),
            xytext=(1.04, height - shift),
            textcoords="axes fraction",
            color=color,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.5},
        )


def op_plot(record: Record, path: Path) -> None:
    """Latency over tokens at the largest width, and speed-up over the best psum at every width.

    Of the record's first operation, and what the second norm costs if that was measured.
    """
    ops = common.grouped(record["rows"], "op")
    norms = ops.pop("second_norm", [])
    ratios = [1.25, 1] * bool(ops) + [0.8] * bool(norms)
    figure, panels = _panels(5.6 * sum(ratios), 4.9, 1, len(ratios), width_ratios=ratios)
    if ops:
        op, rows = next(iter(ops.items()))
        table = {
            width: best_of_lines(of_width, "tokens", "wall_us")
            for width, of_width in common.grouped(rows, "hidden").items()
        }
        base = "psum" if record["facts"]["mode"] != "loopback" else "sum"
        widest = max(table)
        _latency_panel(panels[0], f"{op}, D = {widest:,}", base, table[widest])
        _speed_up_panel(panels[1], base, table)
    if norms:
        _second_norm_panel(panels[-1], norms)
    _save(figure, headline(record) + ", bfloat16", path)


def _latency_panel(axes, title: str, base: str, lines: Lines) -> None:
    tokens = sorted(lines)
    _panel(
        axes,
        f"Latency of {title}",
        "us a call: wall time in a JAX program (dots), kernel time (dashes)",
    )
    _microsecond_axis(axes)
    ends = []
    for name in (base, "flashinfer norm + tail", "fused"):
        points = [(t, lines[t][name].wall) for t in tokens if name in lines[t]]
        if points:
            axes.fill_between(
                [t for t, _ in points],
                [wall.median - wall.spread for _, wall in points],
                [wall.median + wall.spread for _, wall in points],
                color=COLORS[name],
                alpha=0.15,
                linewidth=0,
            )
        label = LABELS[name] + (", best flags" * (name == "psum"))
        medians = [(t, wall.median) for t, wall in points]
        weight = 2.4 if name == "fused" else 1.6
        _curve(axes, ends, medians, label, COLORS[name], marker="o", linewidth=weight)
    for name, dashes in (("fused", (5, 2)), ("flashinfer all-reduce", (5, 2)), ("wire", (1, 1.5))):
        points = [
            (t, lines[t][name].kernel) for t in tokens if name in lines[t] and lines[t][name].kernel
        ]
        color, label = COLORS.get(name, COLORS["floor"]), f"{LABELS[name]}, kernel"
        _curve(axes, ends, points, label, color, linewidth=1.2, dashes=dashes)
    _token_axis(axes, tokens)
    _label_ends(axes, ends)


def _speed_up_panel(axes, base: str, table: dict[int, Lines]) -> None:
    _panel(axes, f"{LABELS[base]} / fused", "speed-up over the best flag set" * (base == "psum"))
    ends = []
    for shade, width in zip(SHADES[-len(table) :], sorted(table)):
        points = [
            (t, line[base].wall.median / line["fused"].wall.median)
            for t, line in sorted(table[width].items())
            if base in line and "fused" in line
        ]
        _curve(axes, ends, points, f"D = {width:,}", shade, marker="o", linewidth=1.8)
    axes.axhline(1, color=COLORS["psum"], linewidth=1)
    axes.set_ylim(bottom=0)
    _token_axis(axes, sorted(table[max(table)]))
    _label_ends(axes, ends)


def _second_norm_panel(axes, rows: Sequence[dict[str, Any]]) -> None:
    _panel(axes, "Second norm", "us a call: fused_sandwich - fused_post_ff")
    widths = common.grouped(rows, "hidden")
    ends, tokens = [], []
    for shade, width in zip(SHADES[-len(widths) :], sorted(widths)):
        costs = {
            count: cost
            for count, line in common.grouped(widths[width], "tokens").items()
            if (cost := second_norm(line)) is not None
        }
        if costs:
            tokens = sorted({*tokens, *costs})
            y, spreads = zip(*costs.values())
            axes.errorbar([*costs], y, spreads, fmt="-o", color=shade, linewidth=1.8, markersize=4)
            ends.append((max(costs), y[-1], f"D = {width:,}", shade))
    axes.axhline(0, color="#555555", linewidth=1)
    _token_axis(axes, tokens)
    _label_ends(axes, ends)


def block_plot(record: Record, path: Path) -> None:
    """Time a layer over tokens, a panel for each model, with its floors."""
    models = common.grouped(record["rows"], "model")
    figure, panels = _panels(5.6 * len(models), 4.6, 1, len(models))
    for axes, (model, rows) in zip(panels, models.items()):
        lines = best_of_lines(rows, "tokens", "layer_us")
        tokens = sorted(lines)
        _panel(axes, f"Block of {model}", "us a layer, wall time")
        _microsecond_axis(axes)
        ends = []
        for name in ("sum", "psum", "fused", "fused sandwich", "matmuls alone"):
            points = [(t, lines[t][name].wall.median) for t in tokens if name in lines[t]]
            floor = name == "matmuls alone"
            style = {"dashes": (5, 2), "linewidth": 1.2} if floor else {"marker": "o"}
            color = COLORS["floor" if floor else name]
            _curve(axes, ends, points, LABELS.get(name, name), color, **style)
        weights = record["facts"]["weights_us"][model]
        axes.axhline(weights, color=COLORS["floor"], linewidth=1.2, dashes=(1, 1.5))
        ends.append((tokens[-1], weights, "weights read once", COLORS["floor"]))
        _token_axis(axes, tokens)
        _label_ends(axes, ends)
    _save(figure, headline(record) + ", bfloat16", path)


def model_plot(record: Record, path: Path) -> None:
    """Time of a decode step over the batch, a panel for each model, with its floor."""
    decodes = [row for row in record["rows"] if row["phase"] == "decode" and "step_us" in row]
    models = common.grouped(decodes, "model")
    columns = min(3, max(1, len(models)))
    lines_of_panels = math.ceil(len(models) / columns) or 1
    figure, panels = _panels(5.4 * columns, 4.2 * lines_of_panels, lines_of_panels, columns)
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    for axes, (model, rows) in zip(panels, models.items()):
        lines, timings = common.grouped(rows, "batch"), best_of_lines(rows, "batch", "step_us")
        _panel(axes, model.replace("_", " "), "us a decode step, wall time")
        _microsecond_axis(axes)
        ends = []
        for name in MODEL_ORDER:
            points = [(n, line[name].wall.median) for n, line in timings.items() if name in line]
            weight = 2.4 if name == "fused" else 1.6
            _curve(axes, ends, points, name, COLORS[name], marker="o", linewidth=weight)
        floors = [max(line, key=lambda row: row["ranks"])["floor_us"] for line in lines.values()]
        axes.plot([*lines], floors, color=COLORS["floor"], linewidth=1.2, dashes=(5, 2))
        ends.append((max(lines), floors[-1], "floor", COLORS["floor"]))
        axes.set_xscale("log", base=2)
        axes.set_xticks([*lines], [str(batch) for batch in lines])
        axes.minorticks_off()
        axes.set_xlabel("batch", fontsize=9)
        _label_ends(axes, ends)
    _save(figure, headline(record) + ", bfloat16, random weights", path)


def tunix_plot(record: Record, path: Path) -> None:
    """Bars of the time of a step, a panel for each phase."""
    phases = common.grouped(record["rows"], "model", "phase", "batch")
    figure, panels = _panels(4.6 * len(phases), 3.2, 1, len(phases))
    for axes, ((model, phase, batch), rows) in zip(panels, phases.items()):
        timings = best(rows, "step_us")
        names = [name for name in MODEL_ORDER if name in timings]
        title = f"{model.replace('_', ' ')}, {phase}, batch {batch}"
        _panel(axes, title, "us a step, wall time")
        for name in names:
            wall = timings[name].wall
            axes.bar(name, wall.median, yerr=wall.spread, width=0.6, color=COLORS[name])
            axes.annotate(f"{wall.median:,.0f}", (name, 0), (0, 4), textcoords="offset points",
                          ha="center", color="white", fontsize=10)  # fmt: skip
    _save(figure, headline(record) + ", bfloat16, random weights", path)


def profile_plot(record: Record, path: Path) -> None:
    """Timelines of the first device on one scale, over stacked bars of the same device."""
    from matplotlib.patches import Patch  # noqa: PLC0415

    sides, walls = _sides(record), _walls(record)
    sums = {label: next(iter(side["devices"].values())) for label, side in sides.items()}
    longest = max(sum(times.values()) for times in sums.values())

    figure, (timeline, bars) = _panels(12, 5.2, 2, 1, height_ratios=(1, 1.15))
    for axes in (timeline, bars):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.tick_params(axis="x", labelsize=9)
        axes.set_yticks(range(len(sides)), sides)
        axes.set_ylim(len(sides) - 0.45, -0.55)
    figure.suptitle(record["title"], x=0.008, ha="left", fontsize=13, fontweight="bold")

    for y, label in enumerate(sides):
        for kind, start, duration in record["timelines"][label]:
            timeline.broken_barh(
                [(start, duration)], (y - 0.32, 0.64), color=COLORS[kind], linewidth=0
            )
    timeline.set_xlim(0, record["window_us"])
    timeline.set_xlabel("us of one GPU's time; white is idle", fontsize=9)

    for y, (label, times) in enumerate(sums.items()):
        left = 0.0
        working = sides[label]["without_waiting"] or {}
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
            if width > 0.045 * longest:
                dark = kind in ("all-reduce", "fused tail")
                bars.text(
                    left + width / 2, y, f"{width:.1f}", ha="center", va="center", fontsize=10,
                    color="white" if dark else "#333333",
                )  # fmt: skip
            left += width
        wall = f"   (wall, in CUDA graphs: {walls[label]})" if label in walls else ""
        bars.text(left, y, f"  {left:.1f}{wall}", va="center", fontsize=10)
    bars.set_xlim(0, 1.32 * longest)
    bars.set_xlabel(
        f"us a {record['unit']}, kernel by kernel; hatched: more than the fastest rank needed",
        fontsize=9,
    )
    shown = [kind for kind in xplane.ORDER if any(times[kind] for times in sums.values())]
    handles = [Patch(facecolor=COLORS[kind], edgecolor="#bbbbbb", linewidth=0.4) for kind in shown]
    figure.legend(handles, shown, loc="upper right", ncols=len(shown), frameon=False, fontsize=9.5)
    _save(figure, _headline_of_own_run(record).strip(), path)


#: Of each kind: its tables, and its picture.
KINDS = {
    "op": (op_markdown, op_plot),
    "block": (block_markdown, block_plot),
    "model": (model_markdown, model_plot),
    "tunix": (model_markdown, tunix_plot),
    "profile": (profile_markdown, profile_plot),
}


def finish(kind: str, content: Record, directory: Path) -> Record:
    """Writes a record and its plot, and prints its tables; an error if none or a wrong one came."""
    path = common.write_record(kind, content, directory)
    record = read(path)
    print(markdown(record))
    print(f"\n{path}")
    timed = any(row.keys() & {"wall_us", "layer_us", "step_us"} for row in record["rows"])
    if not timed and "comparison" not in record:
        sys.exit("nothing was timed")
    if can_draw():
        print(plot(record, path.parent))
    if any(row.get("matches") is False for row in record["rows"]):
        sys.exit("a result is wrong")
    return record


def markdown(record: Record) -> str:
    """The tables of a record."""
    return KINDS[record["kind"]][0](record)


def merged(records: Sequence[Record], name: str) -> Record:
    """One record with the rows and notes of several of one kind; the rest is the first one's."""
    facts = {key: fact for record in reversed(records) for key, fact in record["facts"].items()}
    rows = [row for record in records for row in record["rows"]]
    notes = [note for record in records for note in record["notes"]]
    return records[0] | {"facts": facts, "rows": rows, "notes": notes, "name": name}


def can_draw() -> bool:
    """Returns whether matplotlib is installed; gather.py's stand-in for it has no file."""
    spec = importlib.util.find_spec("matplotlib")
    return spec is not None and spec.origin is not None


def plot(record: Record, folder: Path) -> Path:
    """Draws the picture of a record into a folder and returns its path."""
    path = folder / f"{record['name']}.png"
    KINDS[record["kind"]][1](record, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Tables on the terminal, plots beside the records."
    )
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder of the plots; default: beside the record")
    parser.add_argument(
        "--merge", metavar="NAME", help="make one record of them, NAME.json in --out"
    )
    arguments = parser.parse_args()
    records = [read(path) for path in arguments.records]
    for path, record in zip(arguments.records, records):
        if record["kind"] not in KINDS:
            parser.error(f"{path}: kind must be one of {[*KINDS]}, got {record['kind']!r}")
    folders = [arguments.out or path.parent for path in arguments.records]
    if arguments.merge:
        if len({record["kind"] for record in records}) > 1:
            parser.error("--merge needs records of one kind")
        records = [merged(records, arguments.merge)]
        common.save(records[0], folders[0] / f"{arguments.merge}.json")
    for record, folder in zip(records, folders):
        print(markdown(record))
        print(f"\n{plot(record, folder)}\n")


if __name__ == "__main__":
    main()
