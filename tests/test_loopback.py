"""Tests that need a GPU, with all ranks on one: launches, graphs, sequences of calls, edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xplane
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import children
from helpers.cases import BF16, F16, F32, OPS, Case, assert_matches, make_inputs
from helpers.places import GRAPHS, bits_differ, same_bits
from jax_gemma_arf._src import decision, lowering
from jax_gemma_arf._src.operands import MAX_MESSAGE_BYTES, Operands
from jax_gemma_arf._src.reference import post_ff_tail, tail
from jax_gemma_arf.loopback import loopback_post_ff, loopback_tail

pytestmark = pytest.mark.usefixtures("built", "gpu")


def operands_of(case: Case, ranks: int) -> Operands:
    return jax.tree.map(jnp.asarray, Operands(*make_inputs(case, ranks)))


@pytest.fixture
def gpu(require_gpus):
    (device,) = require_gpus(1)
    with jax.default_device(device):
        yield device


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: jnp.dtype(dtype).name)
def test_all_reduce_for_a_derivative(dtype, algorithm):
    """The norm that changes nothing: the exact sums, rounded once, from tiny to huge."""
    exponents = np.linspace(-14, 12 if dtype == F16 else 48, 9)  # within the range of dtype
    x = np.random.default_rng(0).standard_normal((4, 9, 640)) * 2.0 ** exponents[:, None]
    x = jnp.asarray(x, dtype)
    sums = loopback_tail(
        Operands((x,), (jnp.zeros(640, F32),)),
        eps=lowering.SUM_EPS,
        scale_offset=lowering.SUM_SCALE,
        algorithm=algorithm,
    )
    want = functools.reduce(np.add, np.asarray(x, np.float32)).astype(dtype)
    np.testing.assert_array_equal(sums[0], np.stack([want] * 4))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_one_launch_a_call(tmp_path, ranks, tokens, op):
    """The whole call is one kernel a rank, and nothing else runs on the device."""
    case = Case((tokens,), 2816, op=op, next_norms=int(op == "sandwich"))
    operands = operands_of(case, ranks)
    call = jax.jit(loopback_tail)
    jax.block_until_ready(call(operands))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            jax.block_until_ready(call(operands))
    kernels = [kernel.name for of_gpu in xplane.load(tmp_path).values() for kernel in of_gpu]
    assert len(kernels) == 3 * ranks, kernels
    algorithm = decision.choose_algorithm(ranks, case.branches * 2 * tokens * 2816)
    kernel = {"one_shot": "FusedTailOneShot", "two_shot": "FusedTailTwoShot"}[algorithm]
    assert all(kernel in name for name in kernels), kernels


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize(("op", "next_norms"), [("post_ff", 0), ("moe_tail", 1)])
def test_graph_replay(built, ranks, algorithm, op, next_norms):
    """Hazards 13 and 28: captured once, replayed with other data; Execute neither allocates nor
    synchronises, or the capture would fail, and is not called again."""
    length = 8

    @functools.partial(jax.jit, compiler_options=GRAPHS)
    def chain(operands):
        out = operands.partial_sums[0]
        for _ in range(length):
            *_, out = loopback_tail(operands, algorithm=algorithm)
            operands = operands._replace(partial_sums=(out,) * len(operands.partial_sums))
        return out[-1]

    def expected(operands):
        out = operands.partial_sums[0]
        for _ in range(length):
            sums = operands.partial_sums
            summed = tuple(x.astype(jnp.float32).sum(0).astype(x.dtype) for x in sums)
            rows = operands._replace(partial_sums=summed)
            *_, out = tail(rows, eps=1e-6, scale_offset=0.0)
            again = (jnp.broadcast_to(out, sums[0].shape),) * len(sums)
            operands = operands._replace(partial_sums=again)
        return np.asarray(out).astype(np.float32)

    def inputs(seed):
        return operands_of(Case((5,), 1536, seed=seed, op=op, next_norms=next_norms), ranks)

    def run(seed):
        operands = inputs(seed)
        np.testing.assert_allclose(
            np.asarray(chain(operands)).astype(np.float32),
            expected(operands),
            rtol=2**-6,
            atol=2**-5,
        )

    for seed in range(4):  # eager, captured, updated
        run(seed)
    operands = inputs(0)
    first = np.asarray(chain(operands))
    before = built.enqueued_launches()
    for _ in range(20):
        same_bits(chain(operands), first)
    # Captured again only where XLA gave a buffer another address.
    assert built.enqueued_launches() - before <= 5 * ranks * length


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_alternating_sizes(ranks):
    """Hazards 5, 6 and 14 to 16: sizes, dtypes, operations and algorithms in random order over the
    same workspaces; every call must repeat its first results bit for bit."""
    rng = np.random.default_rng(ranks)
    calls = []
    for dtype in (BF16, F16, F32):
        for tokens in (1, 3, 32, 131, 256):
            for algorithm in ("one_shot", "two_shot"):
                op = str(rng.choice(OPS))
                width = int(rng.choice([640, 2816, 5376]))
                case = Case((tokens,), width, dtype, op=op, next_norms=2 * (op == "sandwich"))
                inputs = make_inputs(case, ranks)
                call = jax.jit(functools.partial(loopback_tail, algorithm=algorithm))
                call = functools.partial(call, operands_of(case, ranks))
                first = call()
                outputs = [np.asarray(out)[0] for out in first]
                assert_matches(case, inputs, outputs, exact_sum=True)
                calls.append((call, first))
    picked = [calls[i] for i in rng.integers(len(calls), size=600)]
    differ = jax.jit(bits_differ)
    wrong = [differ(*pair) for call, first in picked for pair in zip(call(), first)]
    assert not np.any(jax.device_get(wrong))


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("max_ctas", [8, 16, 100])
@pytest.mark.parametrize("op", OPS)
def test_max_ctas(algorithm, max_ctas, op):
    """Few blocks walk over many tokens; the results do not change."""
    operands = operands_of(Case((200,), 2816, op=op, next_norms=int(op == "sandwich")), 2)
    call = functools.partial(loopback_tail, operands, algorithm=algorithm)
    want = call()
    same_bits(call(max_ctas=max_ctas), want)


def test_slow_producer():
    """Hazards 3 and 4: x and residual are written by long kernels right before the call."""

    @jax.jit
    def call(seed):
        square = jax.random.normal(jax.random.key(seed), (4096, 4096), jnp.float32)
        for _ in range(4):
            square = jnp.tanh(square @ square / 64)
        x = square[:2048, :2560].reshape(2, 1024, 2560).astype(jnp.bfloat16)
        residual = square[2048:3072, :2560].astype(jnp.bfloat16)
        norm_scale = jnp.ones(2560, jnp.bfloat16)
        return loopback_post_ff(x, residual, norm_scale), x, residual, norm_scale

    for seed in range(5):
        out, x, residual, norm_scale = call(seed)
        summed = (x[0].astype(jnp.float32) + x[1].astype(jnp.float32)).astype(x.dtype)
        want = post_ff_tail(summed, residual, norm_scale).astype(jnp.float32)
        np.testing.assert_allclose(out[0].astype(jnp.float32), want, rtol=2**-7, atol=2**-7)
        np.testing.assert_array_equal(out[0].view(jnp.uint16), out[1].view(jnp.uint16))


@pytest.mark.parametrize(
    ("ranks", "algorithm"), [(2, "one_shot"), (2, "two_shot"), (4, "one_shot"), (8, "two_shot")]
)
def test_largest_message(built, ranks, algorithm):
    """Hazard 17: the edges of the byte caps, where indices are largest."""
    width = 5376
    kind = "one_shot" if algorithm == "one_shot" else "message"
    limit = built.limits()[f"max_{kind}_bytes"]
    tokens = limit // (2 * width)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (ranks, tokens, width), jnp.bfloat16)
    residual = jax.random.normal(keys[1], (tokens, width), jnp.bfloat16)
    norm_scale = jnp.ones(width, jnp.bfloat16)
    call = functools.partial(loopback_post_ff, algorithm=algorithm)
    out = jax.jit(call)(x, residual, norm_scale)
    summed = functools.reduce(jnp.add, (part.astype(jnp.float32) for part in x))
    want = post_ff_tail(summed.astype(jnp.bfloat16), residual, norm_scale)
    for part in out:
        difference = jnp.abs(part.astype(jnp.float32) - want.astype(jnp.float32))
        assert float(jnp.max(difference)) <= 2**-4  # a unit in the last place of values up to 16
        assert bool(jnp.all(part == out[0]))


def test_above_the_cap():
    """Hazards 15 and 17: an error with the numbers, and the next call works."""
    tokens = MAX_MESSAGE_BYTES // (2 * 5376) + 1
    x = jnp.zeros((2, tokens, 5376), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="at most 268435456 bytes a rank, got"):
        jax.jit(loopback_post_ff)(x, x[0], jnp.ones(5376, jnp.bfloat16)).block_until_ready()
    (out,) = loopback_tail(operands_of(Case(), 2))
    assert np.isfinite(np.asarray(out).astype(np.float32)).all()


def test_persistent_compilation_cache(tmp_path):
    """Hazard 12: a process that finds the executable in the cache still makes its workspace."""
    code = (
        "import jax, jax.numpy as jnp\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "from jax_gemma_arf.loopback import loopback_post_ff\n"
        "x = jnp.ones((2, 3, 640), jnp.bfloat16)\n"
        "out = jax.jit(loopback_post_ff)(x, x[0], jnp.ones(640, jnp.bfloat16))\n"
        "print(float(out.min()), float(out.max()))\n"
    )
    for _ in range(2):
        environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        result = children.python("-P", "-c", code, **environment).check()
        assert result.stdout == "2.0 2.0\n"
    assert list(tmp_path.glob("jit_loopback_post_ff*"))


GOOD_OPERANDS = Operands(*make_inputs(Case(), 2))
GOOD_ATTRIBUTES = lowering.ffi_attributes(
    GOOD_OPERANDS, "one_shot", np.arange(2)[None], 1e-6, 0.0
) | {"local_ranks": np.arange(2), "rendezvous": "", "absent_rank": np.int64(-1)}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"algorithm": "ring"}, "algorithm must be one_shot or two_shot, got ring"),
        ({"axis_size": np.int64(3)}, "axis_size must be 2, 4 or 8, got 3"),
        ({"replica_groups": np.arange(3)}, "whole groups of 2, got 3 ids"),
        ({"eps": np.float32(-1)}, "eps must be positive"),
        ({"max_ctas": np.int64(4)}, "max_ctas must be 0 or from 8 to 1024, got 4"),
        ({"branches": np.int64(3)}, "branches must be from 1 to 2, got 3"),
        ({"next_norms": np.int64(4)}, "next_norms must be from 0 to 3, got 4"),
        ({"absent_rank": np.int64(2)}, "absent_rank must be -1 or from 0 to 1, got 2"),
        ({"local_ranks": np.arange(1)}, "this process must hold all 2 ranks, got 1"),
        (
            {"local_ranks": np.array([0, 2])},
            "local_ranks must rise from 0 to at most 1, got 2 after 0",
        ),
        ({"local_ranks": np.array([0, 0])}, "must rise from 0 to at most 1, got 0 after 0"),
        ({"has_layer_scalar": False}, "expected 3 operands, got 4"),
        ({"next_norms": np.int64(1)}, "expected 5 operands, got 4"),
        ({"eps": None}, "number of attributes"),
    ],
)
def test_bad_attributes(attributes, message):
    """Each handler checks what it is given: an error, never a crash."""
    attributes = {k: v for k, v in (GOOD_ATTRIBUTES | attributes).items() if v is not None}
    operands = jax.tree.leaves(GOOD_OPERANDS)
    result = jax.ShapeDtypeStruct(operands[0].shape, BF16)
    call = jax.ffi.ffi_call(lowering.LOOPBACK_TARGET, result)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*map(jnp.asarray, operands), **attributes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.ones((2, 3, 100), BF16)}, "multiple of 64 from 256 to 16384, got 100"),
        ({0: np.ones((2, 3, 640), np.int8)}, "x must be bfloat16, float16 or float32"),
        ({1: np.ones(639, BF16)}, "norm_scale must have 640 elements, got 639"),
        ({2: np.ones((2, 640), BF16)}, "residual must have 1920 elements, got 1280"),
        ({3: np.ones(2, BF16)}, "layer_scalar must have 1 elements, got 2"),
    ],
)
def test_bad_operands(change, message):
    operands = jax.tree.leaves(GOOD_OPERANDS)
    for index, operand in change.items():
        operands[index] = operand
    result = jax.ShapeDtypeStruct((2, 3, 640), BF16)
    call = jax.ffi.ffi_call(lowering.LOOPBACK_TARGET, result)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*map(jnp.asarray, operands), **GOOD_ATTRIBUTES))


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([((2, 3, 640), F32)], "the results must have residual's type"),
        ([((3, 640), BF16)], "a result must have 3840 elements, got 1920"),
        ([((2, 3, 640), BF16)] * 2, "expected 1 results, got 2"),
    ],
)
def test_bad_results(results, message):
    results = [jax.ShapeDtypeStruct(*result) for result in results]
    call = jax.ffi.ffi_call(lowering.LOOPBACK_TARGET, results)
    operands = map(jnp.asarray, jax.tree.leaves(GOOD_OPERANDS))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*operands, **GOOD_ATTRIBUTES))


# What breaks a call, whatever else is changed besides: for each attribute values (None leaves it
# out), and for each operand arrays.
BREAKING_ATTRIBUTES = {
    "algorithm": ["", "ONE_SHOT", np.int64(1), None],
    "axis_size": [np.int64(0), np.int64(-2), np.int64(16), np.int32(2), 2.0, None],
    "replica_groups": [np.arange(0), np.arange(5), np.arange(2.0), np.int64(0), None],
    "eps": [np.float32("nan"), np.float32(0), np.float64(1e-6), np.int64(1), "1e-6", None],
    "scale_offset": [np.float32("inf"), np.float32("nan"), np.int64(0), None],
    "max_ctas": [np.int64(-1), np.int64(7), np.int64(2**40), np.float32(8), None],
    "branches": [np.int64(0), np.int64(-1), np.int64(2**40), None],
    "has_residual": [False, "true", None],
    "has_layer_scalar": [False, "true", None],
    "next_norms": [np.int64(-1), np.int64(2**33), True, None],
    "local_ranks": [np.arange(0), np.arange(3), np.array([1, 0]), np.array([-1, 0]), None],
    "rendezvous": [np.int64(0), None],
    "absent_rank": [np.int64(-2), np.int64(2**32), np.float32(-1), None],
    "unknown": [np.int64(1)],
}
BREAKING_SHAPES = [(), (1,), (639,), (641,), (2, 0, 640), (2, 3, 64), (3, 3, 640), (5,)]
BREAKING_DTYPES = [np.int8, np.int32, np.uint16, np.bool_, np.complex64]


@st.composite
def broken_calls(draw):
    """(attributes, operands) of which one to three are wrong."""
    attributes, operands = dict(GOOD_ATTRIBUTES), jax.tree.leaves(GOOD_OPERANDS)
    names = st.sampled_from([*BREAKING_ATTRIBUTES, *range(len(operands))])
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        if isinstance(name, str):
            attributes[name] = draw(st.sampled_from(BREAKING_ATTRIBUTES[name]))
        elif draw(st.booleans()):
            shapes = [s for s in BREAKING_SHAPES if np.prod(s) != operands[name].size]
            operands[name] = np.ones(draw(st.sampled_from(shapes)), BF16)
        else:
            dtype = draw(st.sampled_from(BREAKING_DTYPES))
            operands[name] = np.ones(operands[name].shape, dtype)
    attributes = {name: value for name, value in attributes.items() if value is not None}
    operands = operands[: draw(st.sampled_from([len(operands)] * 4 + [1, 0]))]
    return attributes, operands


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(broken=broken_calls())
def test_broken_calls_are_errors(broken):
    """Whatever a call is given, the handlers answer with an error, and the next call works."""
    attributes, operands = broken
    call = jax.ffi.ffi_call(lowering.LOOPBACK_TARGET, jax.ShapeDtypeStruct((2, 3, 640), BF16))
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(call(*map(jnp.asarray, operands), **attributes))
    jax.block_until_ready(loopback_tail(jax.tree.map(jnp.asarray, GOOD_OPERANDS)))
