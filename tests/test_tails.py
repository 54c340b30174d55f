"""One suite of cases against every implementation: psum on a CPU mesh, all ranks on one GPU
(loopback), and a mesh of GPUs (multi_gpu)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.cases import (
    BF16,
    CASES,
    F16,
    F32,
    OPS,
    Case,
    assert_matches,
    make_inputs,
    mistakes,
    norm_flax,
    oracle,
    outputs_of,
    rank_sum,
    rmsnorm,
)
from helpers.places import same_bits
from helpers.runners import (
    FLASHINFER,
    LOOPBACK,
    MULTI_GPU,
    MULTI_GPU_FLASHINFER,
    XLA,
    Runner,
    make_mesh,
    place,
)
from jax_gemma_arf._src import extension


@pytest.fixture(params=[*XLA, *LOOPBACK, *MULTI_GPU, *FLASHINFER, *MULTI_GPU_FLASHINFER], ids=str)
def runner(request, cpus, require_gpus):
    """An implementation, bound to its devices; skipped where they are not there."""
    chosen: Runner = request.param
    if chosen.flashinfer:
        request.getfixturevalue("flashinfer")
    devices = require_gpus(chosen.gpus) if chosen.gpus else cpus[: chosen.ranks]

    def run(case, inputs):
        if case.op not in chosen.ops:
            pytest.skip(f"{chosen} has no {case.op}")
        return chosen.run(case, inputs, devices)

    return dataclasses.replace(chosen, run=run)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracles(runner, case):
    """Hazards 1, 20, 22, 23 and 31: both oracles, and the same bits on every rank."""
    inputs = make_inputs(case, runner.ranks)
    outputs = runner.run(case, inputs)
    for out in outputs:
        assert out.shape == inputs.partial_sums[0].shape
        same_bits(out, np.broadcast_to(out[0], out.shape))
    first = [out[0] for out in outputs]
    assert_matches(case, inputs, first, exact_sum=runner.exact_sum)
    if case.special not in ("nan", "sentinel", "inf"):  # Flax's float32 mean has no claim there
        assert_matches(case, inputs, first, exact_sum=runner.exact_sum, norm=norm_flax)


@pytest.mark.parametrize(("special", "count"), [("nan", 1), ("sentinel", 2)])
@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(runner, op, special, count):
    """Hazard 31: NaN in gives NaN out in the same rows only, and no hang, whatever its bits."""
    case = Case((6,), 640, special=special, op=op, next_norms=int(op == "sandwich"))
    inputs = make_inputs(case, runner.ranks)
    rows = np.isnan(inputs.partial_sums[0].astype(np.float32)).any((0, 2))
    assert rows.sum() == count
    for out in runner.run(case, inputs):
        assert np.isnan(out[0, rows].astype(np.float32)).all()
        assert np.isfinite(out[0, ~rows].astype(np.float32)).all()


@pytest.mark.parametrize("op", OPS)
def test_runs_are_identical(runner, op):
    case = Case((17,), 2560, op=op, next_norms=int(op == "sandwich"))
    inputs = make_inputs(case, runner.ranks)
    first = runner.run(case, inputs)
    for _ in range(3):
        same_bits(runner.run(case, inputs), first)


def test_two_ranks_sum_as_psum_does(runner):
    """At N = 2 the sum is psum's; outputs are equal or one unit in the last place apart, but where
    normed row and residual cancel, and the float32 rounding of the terms shows."""
    if runner.ranks != 2 or runner.gpus == 0:
        pytest.skip("needs the kernel with 2 ranks")
    for dtype in (BF16, F16):
        case = Case((33,), 2816, dtype)
        inputs = make_inputs(case, 2)
        psum = XLA[0].run(case, inputs, jax.devices("cpu")[:2])[0][0]
        out = runner.run(case, inputs)[0][0]
        steps = np.abs(_ordered(out) - _ordered(psum))
        cancelled = np.abs(out.astype(F32)) < 2**-6 * np.abs(inputs.residual.astype(F32))
        assert steps[~cancelled].max() <= 1
        assert (steps == 0).mean() > 0.98
        assert cancelled.mean() < 0.02


@pytest.mark.parametrize("op", OPS)
def test_batch_invariant(runner, op):
    """Hazard 24: a token's bits depend neither on how many share the call nor on its place."""
    case = Case((129,), 2816, op=op, next_norms=int(op == "sandwich"))
    inputs = make_inputs(case, runner.ranks)
    whole = runner.run(case, inputs)
    for start, stop in ((0, 1), (64, 71), (128, 129)):
        part = dataclasses.replace(case, leading=(stop - start,))
        for out, all_tokens in zip(runner.run(part, inputs.tokens(start, stop)), whole):
            expected = all_tokens[:, start:stop]
            if runner.gpus == 0:  # XLA may tile the mean differently; its values still agree
                np.testing.assert_allclose(
                    out.astype(np.float32), expected.astype(np.float32), rtol=2**-6, atol=2**-7
                )
            else:
                same_bits(out, expected)


def runners_agree(runners, op, devices) -> None:
    for leading, width, dtype in (((37,), 5376, BF16), ((5,), 5376, F32), ((9,), 640, F16)):
        case = Case(leading, width, dtype, op=op, next_norms=int(op == "sandwich"))
        inputs = make_inputs(case, runners[0].ranks)
        expected, *others = (one.run(case, inputs, devices) for one in runners)
        for outputs in others:
            same_bits(outputs, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_loopback_algorithms_agree_bit_for_bit(ranks, op, require_gpus):
    """Hazard 24: the size at which one-shot gives way to two-shot does not show in the results."""
    runners_agree([one for one in LOOPBACK if one.ranks == ranks], op, require_gpus(1))


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("op", FLASHINFER[0].ops)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_loopback_flashinfer_agrees_bit_for_bit(ranks, op, require_gpus):
    """Both implementations have the same epilogue and add the ranks in the same order. Sums of zero
    aside, whose sign FlashInfer drops, all four kernels compute the same bits."""
    kernels = [one for one in (*LOOPBACK, *FLASHINFER) if one.ranks == ranks]
    runners_agree(kernels, op, require_gpus(1))


@pytest.mark.parametrize("layer_scalar", [(), None], ids=["scalar", "no_scalar"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_mistakes_fail(op, dtype, layer_scalar):
    """The suite rejects what is easily mistaken for a tail, such as rmsnorm(sum + residual), at the
    loosest tolerance it uses, and accepts the contract at its tightest."""
    next_norms = {"sandwich": 2, "moe_tail": 2}.get(op, 0)
    case = Case((5,), 2816, dtype, layer_scalar=layer_scalar, op=op, next_norms=next_norms)
    inputs = make_inputs(case, 8)
    wrong = mistakes(case, inputs)
    assert bool(wrong) == case.has_residual
    for what, outputs in wrong.items():
        assert not matches(case, inputs, outputs), what
    right = outputs_of(case, inputs, oracle(case, inputs))
    assert_matches(case, inputs, right, exact_sum=True)


@pytest.mark.parametrize("op", OPS)
def test_oracles_reject_a_missing_rank(op):
    """Hazard 25: a sum over a subset of the group fails the suite, in each branch."""
    case = Case((5,), 2816, op=op, next_norms=int(op == "sandwich"))
    inputs = make_inputs(case, 4)
    for branch in range(case.branches):
        sums = list(inputs.partial_sums)
        sums[branch] = sums[branch][:3]
        subset = inputs._replace(partial_sums=tuple(sums))
        with pytest.raises(AssertionError, match="elements of hidden off"):
            assert_matches(
                case, inputs, outputs_of(case, inputs, oracle(case, subset)), exact_sum=False
            )


def cases_with(half):
    """Any shape and options, each dtype `half` or float32."""
    dtypes = st.sampled_from([half, F32])
    next_norms = {"sandwich": st.integers(1, 3), "moe_tail": st.integers(0, 3)}
    return st.sampled_from(OPS).flatmap(
        lambda op: st.builds(
            Case,
            leading=st.lists(st.integers(1, 9), max_size=3).map(tuple),
            width=st.integers(4, 90).map(lambda blocks: 64 * blocks),
            dtype=dtypes,
            residual_dtype=dtypes,
            scale_dtype=dtypes,
            layer_scalar=st.sampled_from([None, (), (1,)]),
            scale_offset=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 2**16),
            op=st.just(op),
            next_norms=next_norms.get(op, st.just(0)),
        )
    )


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from([BF16, F16]).flatmap(cases_with))
def test_any_shape(runner, case):
    assume(case.op in runner.ops)
    inputs = make_inputs(case, runner.ranks)
    outputs = [out[0] for out in runner.run(case, inputs)]
    assert_matches(case, inputs, outputs, exact_sum=runner.exact_sum)


def test_rank_sum_rounds_once():
    """The oracle's own first step, against exact integers: 256 + 1 + 1 in bfloat16 is 258, where
    rounding after each addition would lose both ones."""
    x = np.array([[256.0], [1.0], [1.0]], np.float32).astype(BF16)
    assert float(rank_sum(x)[0]) == 258.0


def matches(case, inputs, outputs) -> bool:
    try:
        assert_matches(case, inputs, outputs, exact_sum=False)
    except AssertionError:
        return False
    return True


def _ordered(values: np.ndarray) -> np.ndarray:
    """16-bit floats as integers in the order of their values, so that neighbours differ by one."""
    bits = values.view(np.uint16).astype(np.int32)
    return np.where(bits & 0x8000, 0x8000 - bits, bits)


WIDTH, UNITS = 640, 512


@pytest.fixture(params=["xla", "multi_gpu_cuda", "multi_gpu_flashinfer"])
def implementation(request, cpus, require_gpus):
    """An implementation and two devices that run it."""
    name = request.param.removeprefix("multi_gpu_")
    if name == "xla":
        return name, cpus[:2]
    if missing := extension.why_missing(name):
        pytest.skip(f"needs the kernel: {missing}")
    return name, require_gpus(2)


def test_block_norms_before_it_adds(implementation):
    """A whole Gemma block agrees with float64, and with no block whose adds come before its norms:
    what a Llama-style fusion would compute from the same weights."""
    name, devices = implementation
    rng = np.random.default_rng(0)
    attended, residual = (rng.standard_normal((5, size)) for size in (UNITS, WIDTH))
    weights = {
        key: rng.standard_normal(shape) * shape[-2] ** -0.5
        for key, shape in {
            "out": (UNITS, WIDTH),
            "gate_up": (2, WIDTH, UNITS),
            "down": (UNITS, WIDTH),
        }.items()
    }
    scales = [1 + rng.standard_normal(WIDTH) / 4 for _ in range(3)]

    def block(attended, residual, weights, post_attention, pre_ff, post_ff):
        options = {"axis_name": "tp", "implementation": name}
        hidden, normed = jga.fused_sandwich(
            attended @ weights["out"], residual, post_attention, next_norm_scale=pre_ff, **options
        )
        gate, up = normed @ weights["gate_up"]
        partial_sums = (jax.nn.gelu(gate) * up) @ weights["down"]
        return jga.fused_post_ff(partial_sums, hidden, post_ff, 0.5, **options)

    def expected(*, norm_first: bool) -> np.ndarray:
        def tail(row, residual, scale):
            if norm_first:
                return rmsnorm(row, scale) + residual
            return rmsnorm(row + residual, scale)

        hidden = tail(attended @ weights["out"], residual, scales[0])
        gate, up = rmsnorm(hidden, scales[1]) @ weights["gate_up"]
        gelu = np.asarray(jax.nn.gelu(jnp.asarray(gate, F32)), np.float64)
        return 0.5 * tail((gelu * up) @ weights["down"], hidden, scales[2])

    mesh = make_mesh((2,), ("tp",), devices)
    specs = {"out": P("tp"), "gate_up": P(None, None, "tp"), "down": P("tp")}
    in_specs = (P(None, "tp"), P(), specs, P(), P(), P())
    call = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=in_specs, out_specs=P()))
    arguments = jax.tree.map(lambda a: a.astype(F32), (attended, residual, weights, *scales))
    out = np.asarray(call(*place(mesh, arguments, in_specs)))

    def error(want):
        return np.linalg.norm(out - want) / np.linalg.norm(want)

    # On GPUs float32 matmuls may run in TF32.
    assert error(expected(norm_first=True)) < 1e-2
    assert error(expected(norm_first=False)) > 0.2
