"""The benchmarks: traces are read right, and what runs on GPUs at least lowers for them."""

import argparse
import dataclasses
import functools
import json
import math
import re
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import block
import common
import jax
import jax.numpy as jnp
import model
import numpy as np
import op
import overlap
import profile_compare
import pytest
import report
import rivals
import thresholds
import tunix_gemma
import xplane

from helpers import children
from jax_gemma_arf._src import operands

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
LAYERS = 2  # in each fixture


@pytest.fixture(params=["psum", "fused"])
def trace(request):
    return xplane.load(FIXTURES / f"{request.param}.txtpb")


def test_devices_are_apart_and_host_threads_left_out(trace):
    assert list(trace) == ["/device:GPU:0", "/device:GPU:1"]


def test_classes_add_up_to_the_time_from_first_to_last(trace):
    for device, times in xplane.attribute(trace).items():
        kernels = trace[device]
        span = max(kernel.end for kernel in kernels) - kernels[0].start
        assert sum(times.values()) == pytest.approx(span / 1e3)
        assert xplane.busy(kernels) == pytest.approx(span - times["idle gap"] * 1e3)


def test_attribution():
    """By hand from the fixture: a layer on GPU 0, where nothing overlaps."""
    times = xplane.attribute(xplane.load(FIXTURES / "psum.txtpb"))["/device:GPU:0"]
    per_layer = {kind: time / LAYERS for kind, time in times.items()}
    assert per_layer == {
        "matmul": 22 + 60 + 31,
        "all-reduce": 9 + 9,
        "norm and elementwise": 3 + 4 + 3 + 4,
        "fused tail": 0,
        "idle gap": 11 - 1 / LAYERS,  # no gap before the first kernel
    }


def test_waiting_is_what_the_fastest_rank_does_not_do():
    """GPU 1 comes early to every collective and waits."""
    psum = xplane.load(FIXTURES / "psum.txtpb")
    assert xplane.without_waiting(psum) == {"all-reduce": 18 * LAYERS, "fused tail": 0}
    fused = xplane.load(FIXTURES / "fused.txtpb")
    assert xplane.without_waiting(fused) == {"all-reduce": 0, "fused tail": 12 * LAYERS}
    one_less = fused | {"/device:GPU:1": fused["/device:GPU:1"][:-1]}
    assert xplane.without_waiting(one_less) is None


def test_gap_in_front_of_a_class():
    names = ("gemm", "jax_gemma_arf", "fusion", "jax_gemma_arf")
    times = ((0, 10), (13, 15), (14, 20), (19, 25))  # the last is launched early
    kernels = [xplane.Kernel(name, *time) for name, time in zip(names, times)]
    assert xplane.gap(kernels, "fused tail") == (3 + 0) / 2
    assert xplane.gap(kernels, "all-reduce") is None


def test_a_gap_of_nothing_is_shown():
    """A tail that starts before the kernel in front ends has a gap of 0, not an unknown one."""
    rows = [{"tokens": 1, "implementation": "fused", "gap_us": 0.0}]
    assert report._gap(rows, 1, "fused") == "0.00"
    assert report._gap(rows, 16, "fused") == "-"


def test_overlapping_kernels_count_once():
    kernels = [xplane.Kernel("nccl", 0, 10), xplane.Kernel("gemm", 4, 6), xplane.Kernel("x", 8, 12)]
    assert xplane.busy(kernels) == 12
    times = xplane.attribute({"gpu": kernels})["gpu"]
    assert times["all-reduce"] == pytest.approx(10e-3)
    assert times["norm and elementwise"] == pytest.approx(2e-3)
    assert times["matmul"] == times["idle gap"] == 0
    assert xplane.overlap(kernels) == 2 / 3
    assert xplane.overlap([xplane.Kernel("x", 0, 1), xplane.Kernel("y", 1, 2)]) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "all-reduce",
        ),
        ("all_reduce_kernel_2", "all-reduce"),
        ("void jax_gemma_arf::(anonymous namespace)::OneShot<__nv_bfloat16>", "fused tail"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "matmul"),
        ("gemm_fusion_dot_12_0", "matmul"),
        ("input_reduce_fusion_3", "norm and elementwise"),
        ("MemcpyD2D", "norm and elementwise"),
    ],
)
def test_classify(name, kind):
    assert xplane.classify(name) == kind


def test_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.xplane\.pb below"):
        xplane.load(tmp_path)


def test_trace_without_a_gpu(tmp_path):
    """One recorded here: read, and refused for want of a GPU."""
    xplane.record(lambda: jax.numpy.ones(3) + 1, tmp_path)
    with pytest.raises(ValueError, match="has no kernels of a GPU"):
        xplane.load(tmp_path)


def test_profile_compare(tmp_path, monkeypatch, capsys):
    traces = [str(FIXTURES / f"{name}.txtpb") for name in ("psum", "fused")]
    monkeypatch.setattr(
        sys, "argv", ["profile_compare.py", *traces, "--per", "2", "--out", str(tmp_path)]
    )
    profile_compare.main()
    table = capsys.readouterr().out
    assert "| all-reduce | 18.0 | 22.0 | 0.0 | 0.0 |" in table
    assert "| all-reduce, least over ranks | 18.0 | 18.0 | 0.0 | 0.0 |" in table
    (record,) = tmp_path.glob("*.json")
    comparison = json.loads(record.read_text())["comparison"]
    assert comparison["fused"]["devices"]["/device:GPU:0"]["fused tail"] == 12
    assert record.with_suffix(".png").stat().st_size > 10_000


def test_overlap(monkeypatch, capsys):
    """On CPUs, where there is nothing to see, each program runs and has its row."""
    sizes = {"WIDTH": 64, "MATMULS": 2, "ITERATIONS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(overlap, name, size)
    monkeypatch.setattr(sys, "argv", ["overlap.py", *overlap.MIDDLES, "--repeats", "1"])
    overlap.main()
    rows = re.findall(r"^\| (\w+) \| \d+ \| - \|$", capsys.readouterr().out, re.MULTILINE)
    assert rows == [*overlap.MIDDLES]


@pytest.mark.parametrize("per", ["3", "7", "1000"])
def test_profile_compare_of_few_kernels(tmp_path, monkeypatch, per):
    """More parts than the trace has kernels, or a number that does not divide them."""
    traces = [str(FIXTURES / f"{name}.txtpb") for name in ("psum", "fused")]
    argv = ["profile_compare.py", *traces, "--per", per, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    profile_compare.main()
    (record,) = tmp_path.glob("*.json")
    assert all(json.loads(record.read_text())["timelines"].values())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["psum.txtpb", "fused.txtpb", "--per", "0"], "--per: must be at least 1, got 0"),
        (["psum.txtpb", "fused.txtpb", "--per", "-1"], "--per: must be at least 1, got -1"),
        (["psum.txtpb", "fused.txtpb", "--window-us", "-5"], "--window-us must be positive"),
        (["psum.txtpb", "nothing.xplane.pb"], "there is no trace nothing.xplane.pb"),
        (["psum.txtpb", "half.xplane.pb"], "half.xplane.pb is truncated, or no trace"),
    ],
)
def test_profile_compare_refuses(tmp_path, monkeypatch, capsys, arguments, error):
    for name in ("psum", "fused"):
        (tmp_path / f"{name}.txtpb").write_text((FIXTURES / f"{name}.txtpb").read_text())
    text = (FIXTURES / "psum.txtpb").read_text()
    whole = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    (tmp_path / "half.xplane.pb").write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["profile_compare.py", *arguments, "--out", "out"])
    with pytest.raises(SystemExit) as raised:
        profile_compare.main()
    assert raised.value.code == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--repeats", "--child-seconds", "--tokens", "--layers"])
def test_sizes_of_a_benchmark_are_positive(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["block.py", option, "0"])
    with pytest.raises(SystemExit):
        block.main()
    assert f"{option}: must be at least 1, got 0" in capsys.readouterr().err


def test_profile_compare_of_its_own_run(tmp_path, monkeypatch, capsys):
    """With children that bring the fixtures for traces: one run of two layers."""
    monkeypatch.setattr(sys, "argv", ["profile_compare.py", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(profile_compare, "RUNS", 1)

    def run_child(flag_set, seconds, on_row, flags, extra):
        on_row({"facts": {"mode": "mesh", "ranks": 2, "layers": LAYERS, "timings": 2}})
        for name in ("psum", "fused"):
            row = {"implementation": name, "flag_set": flag_set, "matches": True}
            if flags == common.NO_COMMAND_BUFFERS:
                folder = Path(extra[1]) / name
                folder.mkdir()
                text = (FIXTURES / f"{name}.txtpb").read_text()
                profile = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
                (folder / "host.xplane.pb").write_bytes(profile)
                row["trace"] = str(folder)
            else:
                row["layer_us"] = [140.0, 141.0, 142.0]
            on_row(row)

    monkeypatch.setattr(common, "run_child", run_child)
    profile_compare.main()
    table = capsys.readouterr().out
    assert "| fused tail | 0.0 | 0.0 | 12.0 | 14.0 |" in table
    assert "| wall time, with CUDA graphs | 141.0 ± 1.0 |" in table
    assert len(list((tmp_path / "out").iterdir())) == 2


def run(script, *arguments, out, **environment):
    command = ROOT / "bench" / script, *arguments, "--quick", "--out", out
    children.python(*command, JAX_PLATFORMS="cpu", **environment).check()
    (path,) = out.glob("*.json")
    assert path.with_suffix(".png").exists()
    return report.read(path)


def test_op_on_cpus(tmp_path):
    record = run("op.py", "--hidden", "1536", "--tokens", "1", "3", out=tmp_path)
    assert record["facts"]["mode"] == "cpu"
    assert record["notes"] == []
    assert [(r["implementation"], r["tokens"]) for r in record["rows"] if r["op"] == "post_ff"] == [
        (name, tokens) for tokens in (1, 3) for name in ("psum", "psum again")
    ]
    assert all(row["matches"] and min(row["wall_us"]) > 0 for row in record["rows"])
    assert "| 3 | " in report.markdown(record)


def test_block_on_cpus(tmp_path):
    record = run("block.py", "--models", "E4B", "--tokens", "4", out=tmp_path)
    assert [row["implementation"] for row in record["rows"]] == ["psum"]
    assert record["rows"][0]["matches"]
    assert record["rows"][0]["relative_error"] < 0.02


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("mode", ["mesh", "loopback"])
def test_every_block_lowers_for_gpus(mode, monkeypatch, cpus):
    """To two calls a layer, and the one that any backend runs computes the block."""
    devices = cpus[: 2 if mode == "mesh" else 1]
    monkeypatch.setattr(common, "devices_for", lambda _: (mode, devices))
    bench = block.Bench(argparse.Namespace(ranks=2, quick=True, repeats=1, layers=2, flag_set="A"))
    sizes = block.Sizes(width=640, ff=1024, heads=512)
    layers, h = bench.parameters(sizes), bench.hidden(sizes, tokens=3)
    assert len(bench.implementations()) == 4
    for name, how in bench.implementations().items():
        program = bench.program(sizes, *how)
        text = program.trace(h, layers).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @jax_gemma_arf") == 4 * name.startswith("fused"), name
        assert text.count("stablehlo.all_reduce") == 4 * (name == "psum"), name
        if name in ("sum", "psum"):
            want = bench.reference(sizes)(h, layers)
            assert common.relative_error(program(h, layers), want) < block.BOUND / 2


@pytest.fixture
def bench(monkeypatch, request, cpus):
    """op.Bench as it would be on GPUs of that mode, with the rivals built."""
    devices = {"mesh": cpus[:2], "loopback": cpus[:1]}[request.param]
    monkeypatch.setattr(common, "devices_for", lambda _: (request.param, devices))
    monkeypatch.setattr(rivals, "load", lambda: True)
    monkeypatch.setattr(rivals, "create", lambda *_: None)
    ranks = {"mesh": "2", "loopback": "4"}[request.param]
    parsed = op.parse(
        ["--ranks", ranks, "--tokens", "8", "--hidden", "640", "--algorithms", "two_shot"]
    )
    parsed.flag_set = "A"
    return op.Bench(parsed)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("bench", ["mesh", "loopback"], indirect=True)
def test_every_contender_lowers_for_gpus(bench):
    """To custom calls of its own, and all-reduces only for psum."""
    for config in bench.configs:
        for contender in bench.contenders(config):
            text = bench.lower(config, contender, platforms=("cuda",)).as_text()
            expected = {
                "custom_call @jax_gemma_arf": contender.name.startswith("fused"),
                "custom_call @rivals": contender.name.startswith(("flashinfer", "wire")),
                "stablehlo.all_reduce": contender.name == "psum",
                '"two_shot"': contender.name.endswith("two_shot"),
            }
            assert {what: what in text for what in expected} == expected, contender.name


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("bench", ["mesh", "loopback"], indirect=True)
def test_second_norm_is_the_only_difference(bench):
    """The two chains that are compared have as many calls, and nothing but calls."""
    (config,) = (c for c in bench.configs if c.op == "second_norm")
    texts = {
        contender.name: bench.lower(config, contender, platforms=("cuda",)).as_text()
        for contender in bench.contenders(config)
    }
    for name, norms in (("fused_post_ff", 0), ("fused_sandwich", 1)):
        text = texts[name]
        assert len(re.findall(r"call @\w+_link", text)) == 200
        assert f"next_norms = {norms} : i64" in text
    operations = [sorted(set(re.findall(r"stablehlo\.\w+", text))) for text in texts.values()]
    assert operations[0] == operations[1]


def test_second_norm_chain_is_checked():
    """With the oracle for the call: hidden goes on, and normed is the last call's."""
    arguments = op.parse(["--tokens", "3", "--hidden", "640", "--ops", "post_ff"])
    arguments.flag_set = "A"
    bench = op.Bench(arguments)
    (config,) = bench.configs
    state, stacked = bench.generator(config)(op.random_key())
    colds = [op.pick(stacked, k) for k in range(config.colds)]
    link, oracle, _ = op.OPS["second_norm"]
    out = jax.jit(op.chain(link, oracle, rounds=2))(state, colds)
    want = jax.jit(op.oracle_chain(link, oracle, rounds=2))(state, stacked)
    assert op.compare(out, want)[1]
    once = jax.jit(op.chain(link, oracle))(state, colds)
    assert not op.compare(once, want)[1]
    link, oracle, _ = op.OPS["post_ff"]
    (hidden,) = jax.jit(op.chain(link, oracle, rounds=2))(state, colds)
    assert op.compare((hidden,), out[:1])[1]


def test_cost_of_the_second_norm():
    """It is taken pair by pair of samples, so that what drifts does not count."""

    def chain(name, samples, **more):
        line = {"op": "second_norm", "hidden": 640, "tokens": 4, "flag_set": "A", "matches": True}
        return line | {"implementation": name, "wall_us": samples} | more

    rows = [
        chain("fused_post_ff", [5.0, 7.0, 9.0, 11.0]),
        chain("fused_sandwich", [5.4, 7.6, 9.4, 11.6]),
    ]
    assert report.second_norm(rows) == (pytest.approx(0.5), pytest.approx(0.1))
    assert "| 4 | 8.0 ± 2.5 | 8.5 ± 2.5 | 0.50 ± 0.10 |" in report.markdown(op_record(rows))
    rows[1]["matches"] = False
    assert report.second_norm(rows) is None


def test_in_turn():
    """One sample of each, and all of them in each round."""
    mesh = jax.make_mesh((1,), ("tp",), devices=jax.devices("cpu")[:1])
    clock, taken = common.Clock(mesh, repeats=3), []
    samples = clock.in_turn([lambda: taken.append("a"), lambda: taken.append("b")], parts=1)
    assert [len(line) for line in samples] == [3, 3]
    assert "".join(taken[8:]) == "aabb" * 3


def test_oracle_chain_is_the_chain():
    """The loop that checks computes what the calls in a row compute, with psum for the call."""
    arguments = op.parse(["--tokens", "3", "--hidden", "640"])
    arguments.flag_set = "A"
    bench = op.Bench(arguments)
    for config in bench.configs:
        state, stacked = bench.generator(config)(op.random_key())
        colds = [op.pick(stacked, k) for k in range(config.colds)]
        (psum,) = bench.contenders(config)
        out = bench.program(psum.body)(state, colds)
        assert psum.oracle is not None
        want = psum.oracle(state, stacked)
        error, within = op.compare(out, want)
        assert within
        assert error < op.BOUND / 2
        first_rank, *others = out
        for factor in (1.04, math.nan):  # in one row of one rank
            changed = first_rank.at[0, 1].multiply(factor)
            assert not op.compare((changed, *others), want)[1]


def test_flashinfers_own_rule():
    assert rivals.one_shot(2, 128 << 20)
    assert not rivals.one_shot(4, (8 << 20) + 16)


def op_record(rows):
    facts = {"mode": "mesh", "ranks": 2}
    machine = {"gpus": [], "driver": None, "versions": {}, "commit": "0"}
    record = {"kind": "op", "rows": rows, "facts": facts, "machine": machine, "notes": []}
    return record | {"created": "2026-01-01"}


def row(implementation, flag_set, samples, **more):
    line = {"op": "post_ff", "hidden": 640, "tokens": 1}
    return (
        line | {"implementation": implementation, "flag_set": flag_set, "wall_us": samples} | more
    )


def test_best_flag_set_counts_and_wrong_results_do_not():
    rows = [
        row("psum", "A", [20.0, 21.0, 22.0]),
        row("psum", "B", [10.0, 11.0, 12.0]),
        row("psum", "C", [1.0, 1.0, 1.0], matches=False),
        row("fused", "A", [5.0, 5.5, 6.0], matches=True),
        {"op": "post_ff", "hidden": 640, "tokens": 1, "implementation": "wire", "flag_set": "A"}
        | {"error": "RuntimeError: no link"},
    ]
    best = report.best(rows, "wall_us")
    assert best["psum"].flag_set == "B"
    assert report.faster(best["psum"], best["fused"]) == "2.00"
    text = report.markdown(op_record(rows))
    assert "WRONG RESULT: op post_ff, implementation psum, flag_set C" in text
    assert "RuntimeError: no link" in text


def algorithm_rows(times, op="post_ff", width=640):
    """Rows of both algorithms. times: kernel times of one-shot and two-shot, by tokens."""
    return [
        {"op": op, "hidden": width, "tokens": tokens, "flag_set": "A", "matches": True}
        | {"implementation": f"fused {algorithm}", "wall_us": [9.0], "kernel_us": time}
        for tokens, pair in times.items()
        for algorithm, time in zip(("one_shot", "two_shot"), pair)
    ]


# One-shot is the faster up to 64 tokens, but for noise at 16 and at 256.
TIMES = {1: (3, 4), 16: (3.9, 3.8), 64: (5, 6), 128: (8, 7), 256: (12.9, 13), 512: (30, 20)}


def test_limit_of_one_shot():
    """Where kernel times cross, in bytes of all partial sums; noise and wrong results aside."""
    rows = algorithm_rows(TIMES)
    limit = thresholds.one_shot_max_bytes
    assert limit(op_record(rows)) == 2 * 64 * 640
    assert limit(op_record(algorithm_rows(TIMES, "moe_tail"))) == 2 * 2 * 64 * 640
    finer = algorithm_rows({50: (4, 5), 60: (6, 5)}, width=1280)
    assert limit(op_record([*finer, *rows])) == 2 * 50 * 1280
    wrong = [r | {"matches": False} for r in algorithm_rows({400: (1, 90)})]
    failed = [{k: v for k, v in r.items() if k != "kernel_us"} for r in wrong]
    assert limit(op_record([*rows, *wrong, *failed, row("psum", "A", [9.0])])) == 2 * 64 * 640


@pytest.mark.parametrize(
    ("times", "error"),
    [
        ({1: (3, 4), 64: (5, 6)}, "one-shot is faster at all sizes.*; time more --tokens"),
        ({1: (4, 3), 64: (6, 5)}, "two-shot is faster at all sizes.*; time fewer --tokens"),
        ({}, "no line has both; time them with --algorithms one_shot two_shot"),
    ],
)
def test_no_limit_of_one_shot(times, error):
    with pytest.raises(ValueError, match=error):
        thresholds.one_shot_max_bytes(op_record(algorithm_rows(times)))


def test_thresholds_of_a_record(tmp_path, monkeypatch):
    """The package reads what is written; other entries stay."""
    machine = {"gpus": ["H200"] * 2, "driver": "580", "versions": {"jax": "0.12"}, "commit": "abc"}
    facts = {"mode": "mesh", "ranks": 2, "device": "H200"}
    record: dict[str, Any] = op_record(algorithm_rows(TIMES)) | {"machine": machine, "facts": facts}
    file, path = tmp_path / "limits.json", tmp_path / "op-2xH200.json"
    file.write_text(thresholds.FILE.read_text())
    common.save(record, path)
    monkeypatch.setattr(sys, "argv", ["thresholds.py", str(path)])
    monkeypatch.setattr(thresholds.write, "__defaults__", (file,))
    thresholds.main()
    before, after = map(operands.read_thresholds, (thresholds.FILE, file))
    assert after == before | {("H200", 2): 2 * 64 * 640}
    measured = json.loads(file.read_text())["H200"]["2"]["measured"]
    assert measured == machine | {"record": "op-2xH200", "created": "2026-01-01"}
    record["facts"]["mode"] = "loopback"
    common.save(record, path)
    with pytest.raises(SystemExit, match=r"op-2xH200: .* must be of a mesh of GPUs"):
        thresholds.main()


def test_write_thresholds_times_both():
    assert op.parse(["--write-thresholds"]).algorithms == ["one_shot", "two_shot"]


def model_record() -> dict[str, Any]:
    """A record of one model on two GPUs, with a wrong row and a profile."""
    line = {"model": "Gemma4_26B_A4B", "flag_set": "A", "matches": True, "relative_error": 0.04}
    floors = {"floor_us": 640.0, "floor_all_experts_us": 840.0, "ranks": 2}
    alone = {"floor_us": 1280.0, "floor_all_experts_us": 1680.0, "ranks": 1}
    decode = line | floors | {"phase": "decode", "batch": 16, "tokens": 16}
    shares = dict.fromkeys(xplane.ORDER, 0.2)
    rows = [
        decode | alone | {"implementation": "official, one GPU", "step_us": [2990.0, 3000.0, 3010]},
        decode
        | {"implementation": "fused", "step_us": [900.0, 1000.0, 1100.0]}
        | {"kernels": 917.4, "profiled_us": 1020.0, "shares": shares, "overlap": 0.98},
        decode | {"implementation": "official, partitioned", "step_us": [4000.0] * 3},
        decode | {"implementation": "psum", "step_us": [2000.0] * 3},
        decode | {"implementation": "psum", "step_us": [9.0] * 3, "matches": False},
        decode
        | {"phase": "sampler", "implementation": "fused", "step_us": [1000.0, 1010.0, 1020.0]},
    ]
    facts = {"mode": "mesh", "ranks": 2, "prompt": 1024}
    facts["Gemma4_26B_A4B"] = {
        "layers": 30,
        "hidden": 2816,
        "bandwidth": 3e12,
        "matmul_rate": 6e14,
    }
    machine = {"gpus": [], "driver": None, "versions": {}, "commit": "0"}
    record = {"kind": "model", "rows": rows, "facts": facts, "machine": machine, "notes": ["n"]}
    return record | {"created": "2026-01-01", "name": "model-x"}


def test_table_of_models(tmp_path):
    text = report.markdown(model_record())
    assert (
        "| us a step | official, one GPU | official, partitioned | psum | fused | floor |" in text
    )
    times = "3000.0 ± 10.0 | 4000.0 ± 0.0 | 2000.0 ± 0.0 | 1000.0 ± 100.0"
    ratios = "3.00 | 4.00 | 2.00 | 16000.0 ± 1600.0"
    assert f"| decode, batch 16 | {times} | 640 [840] | {ratios} |" in text
    assert "| sampler, batch 16 |  |  |  | 1010.0 ± 10.0 |" in text
    assert f"| fused, batch 16 | 917 | 1020 |{' 20% |' * len(xplane.ORDER)} 98% |" in text
    assert "30 layers, D = 2816; copies run at 3.00 TB/s, matmuls at 600 TFLOP/s." in text
    assert "WRONG RESULT: model Gemma4_26B_A4B, phase decode, batch 16" in text
    assert report.plot(model_record(), tmp_path).stat().st_size > 10_000


def test_merged_records(tmp_path, monkeypatch):
    """Rows of both, and the facts of each model."""
    first, second = model_record(), model_record()
    second["facts"] = {"mode": "cpu", "Gemma4_E2B": {}}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for record, path in zip((first, second), paths):
        common.save(record, path)
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, paths), "--merge", "both"])
    report.main()
    both = report.read(tmp_path / "both.json")
    assert both["rows"] == first["rows"] + second["rows"]
    assert both["facts"] == first["facts"] | {"Gemma4_E2B": {}}
    assert (tmp_path / "both.png").exists()


def test_every_model_runs_in_a_child_of_its_own(monkeypatch):
    """A model that fails takes no rows of the others with it."""
    started = []

    def run_child(flag_set, seconds, on_row, extra_flags="", extra_arguments=()):
        started.append((flag_set, *extra_arguments))
        on_row({"facts": {"mode": "mesh", "timings": 1, extra_arguments[1]: {"layers": 2}}})
        on_row({"note": f"{extra_arguments[1]}: left out"})
        on_row({"model": extra_arguments[1]})
        return "stopped after 9 s" if extra_arguments[1] == "A" else None

    monkeypatch.setattr(common, "run_child", run_child)
    arguments = argparse.Namespace(child_seconds=9)
    variants = [("--models", name) for name in "AB"]
    content = common.run_children(["C", "A"], arguments, "{model}", variants)
    assert started == [(flags, "--models", name) for name in "AB" for flags in "AC"]
    assert content["facts"]["A"] == content["facts"]["B"] == {"layers": 2}
    assert [row["model"] for row in content["rows"]] == ["A", "A", "B", "B"]
    assert content["notes"].count("A stopped after 9 s") == 2
    assert "B: left out" in content["notes"]


@pytest.fixture
def gemma():
    """Skips without the package, and lets it warn while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("gemma", reason="needs google-deepmind/gemma: pip install '.[gemma]'")
        yield


@pytest.mark.usefixtures("gemma")
@pytest.mark.parametrize("name", ["E2B", "26B_A4B", "Gemma3"])
def test_work_of_a_step(name, cpus):
    """By hand, for each kind of model at small sizes, on one device."""
    cls = {"E2B": "Gemma4_E2B", "26B_A4B": "Gemma4_26B_A4B", "Gemma3": "Gemma3_4B"}[name]
    official = model.official(cls, 4, small=True)
    config = official.config
    mesh = jax.make_mesh((1,), ("tp",), devices=cpus[:1])
    whole = jax.NamedSharding(mesh, jax.P())

    def struct(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole)

    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(official.init, jax.random.key(0), token)["params"]
    params = jax.tree.map(struct, params)
    make = functools.partial(config.init_cache, batch_size=2, dtype=jnp.bfloat16, cache_length=64)
    cache = jax.tree.map(struct, jax.eval_shape(make))
    assert config.sliding_window_size == 16

    everything = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    if name == "E2B":  # two of four layers use the keys and values of the others
        everything -= 2 * params["embedder"]["per_layer_embeddings"].size
        for layer in ("layer_2", "layer_3"):
            everything -= 2 * params[layer]["attn"]["kv_einsum"]["w"].size
    kv = 0
    for i in range(2 if name == "E2B" else 4):
        kv += 2 * 2 * cache[f"layer_{i}"]["k"].size * (16 / 64 if i % 2 == 0 else 1)
    work = model.step_work(config, params, cache, every_expert=True)
    assert work.bytes == everything + kv
    if name == "26B_A4B":  # 8 experts, of which a token chooses 8
        assert model.step_work(config, params, cache).bytes == work.bytes
        fewer = dataclasses.replace(config, top_k_experts=1)
        experts = sum(
            2 * params[f"layer_{i}"]["mlp"][kind]["w"].size
            for i in range(4)
            for kind in ("gating_einsum", "linear")
        )
        assert model.step_work(fewer, params, cache).bytes == work.bytes - experts * 6 / 8
    prompt = model.step_work(config, params, cache, tokens=64)
    assert prompt.bytes == everything
    assert prompt.flops > 60 * (work.flops - 4 * params["embedder"]["input_embedding"].size)


def test_noise_is_the_same_on_every_mesh(cpus):
    mesh = jax.make_mesh((2,), ("tp",), devices=cpus[:2])
    make = functools.partial(jax.jit, model.noise, static_argnums=0)
    whole = make()((64, 640), jnp.uint32(3))
    sharded = make(out_shardings=jax.NamedSharding(mesh, jax.P("tp")))((64, 640), jnp.uint32(3))
    assert (np.asarray(whole) == np.asarray(sharded)).all()
    assert abs(float(whole.mean())) < 0.02
    assert float(whole.std()) == pytest.approx(1, abs=0.02)
    other = make()((64, 640), jnp.uint32(4))
    assert abs(np.corrcoef(whole.ravel(), other.ravel())[0, 1]) < 0.02


@pytest.mark.timeout(300)  # a model in three ways, each compiled
@pytest.mark.usefixtures("gemma")
def test_model_on_cpus(tmp_path):
    record = run("model.py", out=tmp_path)
    assert record["notes"] == []
    assert [(r["implementation"], r["phase"]) for r in record["rows"]] == [
        ("official, one GPU", "prefill"),
        ("official, one GPU", "decode"),
        ("official, one GPU", "sampler"),
        ("official, partitioned", "prefill"),
        ("official, partitioned", "decode"),
        ("psum", "prefill"),
        ("psum", "decode"),
        ("psum", "sampler"),
    ]
    assert all(row["matches"] and row["floor_us"] > 0 for row in record["rows"])
    assert max(row.get("relative_error", 0) for row in record["rows"]) < 0.05


@pytest.fixture
def tunix():
    """Skips without the package, and lets it warn while it is imported and used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tunix", reason="needs google-tunix: pip install '.[tunix]'")
        yield


@pytest.mark.usefixtures("tunix")
def test_tunix_on_cpus(tmp_path):
    record = run("tunix_gemma.py", out=tmp_path, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert record["notes"] == []
    assert [(row["phase"], row["implementation"]) for row in record["rows"]] == [
        (phase, name) for phase in ("decode", "training") for name in ("official", "psum")
    ]
    assert all(row["matches"] and min(row["step_us"]) > 0 for row in record["rows"])
    losses = record["rows"][-1]["losses"]
    assert losses == sorted(losses, reverse=True)
    text = report.markdown(record)
    assert "| us a step | official | psum | official / psum | psum, tokens/s |" in text
    assert "| training, batch 1 |" in text


@pytest.mark.usefixtures("built", "tunix")
def test_tunix_lowers_for_gpus(monkeypatch, cpus):
    """To two calls a layer, in sampling and in training, whose backward pass has none."""
    monkeypatch.setattr(common, "devices_for", lambda _: ("mesh", cpus[:2]))
    options = {"model": "Gemma3_4B", "layers": 4, "length": 32, "steps": 16, "batch": 2}
    options |= {"ranks": 2, "quick": True, "train_batch": 2, "flag_set": "A"}
    bench = tunix_gemma.Bench(argparse.Namespace(**options))
    bench.small = True
    arrays = bench.parameters()
    with bench.mesh:
        for make in (bench.sampling, bench.training):
            run = make("fused", arrays)
            traced = run.jitted.trace(*run.operands())
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("custom_call @jax_gemma_arf") == 2 * 4


def test_sampled_tokens_count_up_to_the_first_difference():
    want = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    compare = tunix_gemma.Sampling.compare
    assert compare(want, want) == {"token_error": 0, "matches": True}
    other = np.array([[1, 2, 3, 4], [5, 0, 0, 0]])
    assert compare(other, want) == {"token_error": pytest.approx(1 / 6), "matches": True}
    assert not compare(want + 1, want)["matches"]


def test_losses_that_are_off():
    want = np.array([[8, 4], [100, 50]], np.float32)
    compare = tunix_gemma.Training.compare
    assert compare(want, want)["matches"]
    off = compare(want * [[1, 1.01], [1, 1]], want)
    assert off["loss_error"] == pytest.approx(0.01)
    assert not off["matches"]
    assert not compare(want * [[1, 1], [1.1, 1]], want)["matches"]


def test_model_without_gemma():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); "
    code += "sys.modules['gemma'] = None; import model; model.main()"
    result = children.python("-c", code)
    assert result.status == 2
    assert result.stderr.endswith("needs google-deepmind/gemma: pip install '.[bench,gemma]'\n")


def test_differences_within_the_spread_do_not_count():
    one, two = common.summarize([9.0, 10.0, 11.0]), common.summarize([10.0, 11.0, 12.0])
    assert one == (10.0, 1.0) == (statistics.median([9, 10, 11]), 1)
    assert not common.differ(one, two)
    assert common.differ(one, common.summarize([13.0, 13.1, 13.2]))


def test_a_child_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c", "import time; print('{}', flush=True); time.sleep(99)"])
    rows = []
    assert common.run_child("A", 2, rows.append) == "flag set A: stopped after 2 s"
    assert rows == [{}]


def test_a_child_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c", "raise SystemExit('out of memory')"])
    failure = common.run_child("C", 20, lambda _: None)
    assert failure == "flag set C: exit status 1: out of memory\n"


@pytest.mark.parametrize(
    "flags", [common.FLAG_SETS["B"], common.FLAG_SETS["D"], common.NO_COMMAND_BUFFERS]
)
def test_xla_knows_the_flags(flags):
    """It ends the process if it does not."""
    code = "import jax; jax.devices('cpu')"
    children.python("-c", code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").check()
