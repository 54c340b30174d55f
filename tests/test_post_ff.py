"""One suite of cases against every implementation: psum on a CPU mesh, all ranks on one GPU
(loopback), and a mesh of GPUs (multi_gpu)."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import (
    BF16,
    CASES,
    F16,
    F32,
    Case,
    assert_matches,
    make_inputs,
    mistaken_order,
    oracle_flax,
    oracle_float64,
    rank_sum,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runners import LOOPBACK, MULTI_GPU, XLA, Runner


@pytest.fixture(params=[*XLA, *LOOPBACK, *MULTI_GPU], ids=str)
def runner(request, cpus, require_gpus):
    """An implementation, bound to its devices; skipped where they are not there."""
    chosen: Runner = request.param
    devices = require_gpus(chosen.gpus) if chosen.gpus else cpus[: chosen.ranks]
    return dataclasses.replace(chosen, run=lambda case, inputs: chosen.run(case, inputs, devices))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracles(runner, case):
    """Hazards 1, 20, 22, 23 and 31: both oracles, and the same bits on every rank."""
    inputs = make_inputs(case, runner.ranks)
    out = runner.run(case, inputs)
    assert out.shape == inputs.x.shape
    for rank in range(runner.ranks):
        np.testing.assert_array_equal(out[rank].view(np.uint8), out[0].view(np.uint8))
    expected = oracle_float64(case, inputs)
    assert_matches(case, inputs, out[0], expected, exact_sum=runner.exact_sum)
    if case.special not in ("nan", "inf"):  # Flax's float32 mean has no claim there
        assert_matches(case, inputs, out[0], oracle_flax(case, inputs), exact_sum=runner.exact_sum)


def test_nan_stays_in_its_row(runner):
    """Hazard 31: NaN in gives NaN out in the same rows only, and no hang."""
    case = Case((6,), 640, special="nan")
    inputs = make_inputs(case, runner.ranks)
    out = runner.run(case, inputs)[0].astype(np.float32)
    rows = np.isnan(inputs.x.astype(np.float32)).any((0, 2))
    assert rows.sum() == 1
    assert np.isnan(out[rows]).all()
    assert np.isfinite(out[~rows]).all()


def test_runs_are_identical(runner):
    case = Case((17,), 2560)
    inputs = make_inputs(case, runner.ranks)
    first = runner.run(case, inputs)
    for _ in range(3):
        np.testing.assert_array_equal(runner.run(case, inputs).view(np.uint8), first.view(np.uint8))


def test_two_ranks_sum_as_psum_does(runner):
    """At N = 2 the sum is psum's; outputs are equal or one unit in the last place apart, but where
    normed row and residual cancel, and the float32 rounding of the terms shows."""
    if runner.ranks != 2 or runner.gpus == 0:
        pytest.skip("needs the kernel with 2 ranks")
    for dtype in (BF16, F16):
        case = Case((33,), 2816, dtype)
        inputs = make_inputs(case, 2)
        psum = XLA[0].run(case, inputs, jax.devices("cpu")[:2])[0]
        out = runner.run(case, inputs)[0]
        steps = np.abs(_ordered(out) - _ordered(psum))
        cancelled = np.abs(out.astype(F32)) < 2**-6 * np.abs(inputs.residual.astype(F32))
        assert steps[~cancelled].max() <= 1
        assert (steps == 0).mean() > 0.98
        assert cancelled.mean() < 0.02


def test_batch_invariant(runner):
    """Hazard 24: a token's bits depend neither on how many share the call nor on its place."""
    case = Case((129,), 2816)
    inputs = make_inputs(case, runner.ranks)
    whole = runner.run(case, inputs)[0]
    for start, stop in ((0, 1), (64, 71), (128, 129)):
        part = dataclasses.replace(
            inputs, x=inputs.x[:, start:stop], residual=inputs.residual[start:stop]
        )
        out = runner.run(dataclasses.replace(case, leading=(stop - start,)), part)[0]
        if runner.gpus == 0:  # XLA may tile the mean differently; its values still agree
            np.testing.assert_allclose(
                out.astype(np.float32), whole[start:stop].astype(np.float32), rtol=2**-7, atol=2**-7
            )
        else:
            np.testing.assert_array_equal(out.view(np.uint8), whole[start:stop].view(np.uint8))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_loopback_algorithms_agree_bit_for_bit(ranks, require_gpus):
    """Hazard 24: the size at which one-shot gives way to two-shot does not show in the results."""
    devices = require_gpus(1)
    one, two = (runner for runner in LOOPBACK if runner.ranks == ranks)
    for case in (Case((37,), 5376), Case((5,), 5376, F32), Case((9,), 640, F16)):
        inputs = make_inputs(case, ranks)
        np.testing.assert_array_equal(
            one.run(case, inputs, devices).view(np.uint8),
            two.run(case, inputs, devices).view(np.uint8),
        )


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_mistaken_order_fails(dtype):
    """The suite rejects rmsnorm(sum + residual) * scalar, at the loosest tolerance it uses."""
    for case in (Case((5,), 2816, dtype), Case((5,), 2816, dtype, layer_scalar=None)):
        inputs = make_inputs(case, 8)
        wrong = mistaken_order(case, inputs).astype(dtype)
        expected = oracle_float64(case, inputs)
        with pytest.raises(AssertionError, match="elements off"):
            assert_matches(case, inputs, wrong, expected, exact_sum=False)
        right = expected.astype(dtype)
        assert_matches(case, inputs, right, expected, exact_sum=True)


def test_oracles_reject_a_missing_rank():
    """Hazard 25: a sum over a subset of the group fails the suite."""
    case = Case((5,), 2816)
    inputs = make_inputs(case, 4)
    subset = dataclasses.replace(inputs, x=inputs.x[:3])
    with pytest.raises(AssertionError, match="elements off"):
        assert_matches(
            case,
            inputs,
            oracle_float64(case, subset).astype(BF16),
            oracle_float64(case, inputs),
            exact_sum=False,
        )


def cases_with(half):
    """Any shape and options, each dtype `half` or float32."""
    dtypes = st.sampled_from([half, F32])
    return st.builds(
        Case,
        leading=st.lists(st.integers(1, 9), max_size=3).map(tuple),
        hidden=st.integers(4, 90).map(lambda blocks: 64 * blocks),
        dtype=dtypes,
        residual_dtype=dtypes,
        scale_dtype=dtypes,
        layer_scalar=st.sampled_from([None, (), (1,)]),
        scale_offset=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 2**16),
    )


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from([BF16, F16]).flatmap(cases_with))
def test_any_shape(runner, case):
    inputs = make_inputs(case, runner.ranks)
    out = runner.run(case, inputs)[0]
    assert_matches(case, inputs, out, oracle_float64(case, inputs), exact_sum=runner.exact_sum)


def test_rank_sum_rounds_once():
    """The oracle's own first step, against exact integers: 256 + 1 + 1 in bfloat16 is 258, where
    rounding after each addition would lose both ones."""
    x = np.array([[256.0], [1.0], [1.0]], np.float32).astype(BF16)
    assert float(rank_sum(x)[0]) == 258.0


def _ordered(values: np.ndarray) -> np.ndarray:
    """16-bit floats as integers in the order of their values, so that neighbours differ by one."""
    bits = values.view(np.uint16).astype(np.int32)
    return np.where(bits & 0x8000, 0x8000 - bits, bits)
