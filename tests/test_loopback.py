"""What only a GPU can show, with all ranks on one: launches, graphs, sequences of calls, edges."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16, F16, F32, Case, assert_matches, make_inputs, oracle_float64
from profiles import kernels_in

from jax_gemma_arf import lowering, support
from jax_gemma_arf.loopback import loopback_post_ff
from jax_gemma_arf.reference import post_ff_tail

pytestmark = pytest.mark.usefixtures("built", "gpu")


@jax.jit
def differ(one, two):
    """Whether any bit differs."""
    bits = {2: jnp.uint16, 4: jnp.uint32}[one.dtype.itemsize]
    cast = functools.partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    return jnp.any(cast(one) != cast(two))


@pytest.fixture
def gpu(require_gpus):
    (device,) = require_gpus(1)
    with jax.default_device(device):
        yield device


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_one_launch_a_call(tmp_path, ranks, tokens):
    """The whole call is one kernel a rank, and nothing else runs on the device."""
    operands = make_inputs(Case((tokens,), 2816), ranks).operands()
    call = jax.jit(loopback_post_ff)
    placed = [jnp.asarray(operand) for operand in operands]
    call(*placed).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            call(*placed).block_until_ready()
    kernels = kernels_in(tmp_path)
    assert len(kernels) == 3 * ranks, kernels
    algorithm = support.choose_algorithm(ranks, 2 * tokens * 2816)
    assert all(algorithm.replace("_", "") in name for name in kernels), kernels


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_graph_replay(built, ranks, algorithm):
    """Hazards 13 and 28: captured once, replayed with other data; Execute neither allocates nor
    synchronises, or the capture would fail, and is not called again."""
    length = 8

    @functools.partial(
        jax.jit,
        compiler_options={
            "xla_gpu_graph_min_graph_size": "1",
            "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUSTOM_CALL",
        },
    )
    def chain(x, residual, norm_scale, layer_scalar):
        for _ in range(length):
            x = loopback_post_ff(x, residual, norm_scale, layer_scalar, algorithm=algorithm)
        return x[-1]

    def expected(x, residual, norm_scale, layer_scalar):
        for _ in range(length):
            summed = x.astype(jnp.float32).sum(0).astype(x.dtype)
            out = post_ff_tail(summed, residual, norm_scale, layer_scalar)
            x = jnp.broadcast_to(out, x.shape)
        return np.asarray(out).astype(np.float32)

    def run(seed):
        operands = make_inputs(Case((5,), 1536, seed=seed), ranks).operands()
        placed = [jnp.asarray(operand) for operand in operands]
        np.testing.assert_allclose(
            np.asarray(chain(*placed)).astype(np.float32),
            expected(*placed),
            rtol=2**-6,
            atol=2**-5,
        )

    for seed in range(4):  # eager, captured, updated
        run(seed)
    operands = [jnp.asarray(a) for a in make_inputs(Case((5,), 1536), ranks).operands()]
    first = np.asarray(chain(*operands))
    before = built.enqueued_launches()
    for _ in range(20):
        out = np.asarray(chain(*operands))
        np.testing.assert_array_equal(out.view(np.uint8), first.view(np.uint8))
    # Captured again only where XLA gave a buffer another address.
    assert built.enqueued_launches() - before <= 5 * ranks * length


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_alternating_sizes(ranks):
    """Hazards 5, 6 and 14 to 16: sizes, dtypes and algorithms in random order over the same
    workspaces; every call must repeat its first result bit for bit."""
    rng = np.random.default_rng(ranks)
    calls = []
    for dtype in (BF16, F16, F32):
        for tokens in (1, 3, 32, 131, 256):
            for algorithm in ("one_shot", "two_shot"):
                case = Case((tokens,), int(rng.choice([640, 2816, 5376])), dtype)
                inputs = make_inputs(case, ranks)
                placed = [jnp.asarray(operand) for operand in inputs.operands()]
                call = jax.jit(functools.partial(loopback_post_ff, algorithm=algorithm))
                first = call(*placed)
                expected = oracle_float64(case, inputs)
                assert_matches(case, inputs, np.asarray(first)[0], expected, exact_sum=True)
                calls.append((functools.partial(call, *placed), first))
    picked = [calls[i] for i in rng.integers(len(calls), size=600)]
    wrong = [differ(call(), first) for call, first in picked]
    assert not np.any(jax.device_get(wrong))


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("max_ctas", [8, 16, 100])
def test_max_ctas(algorithm, max_ctas):
    """Few blocks walk over many tokens; the result does not change."""
    operands = [jnp.asarray(a) for a in make_inputs(Case((200,), 2816), 2).operands()]
    call = functools.partial(loopback_post_ff, *operands, algorithm=algorithm)
    want, got = np.asarray(call()), np.asarray(call(max_ctas=max_ctas))
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


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
    """Hazard 17: the edges of the byte caps, where FlashInfer's int32 indices are largest."""
    hidden = 5376
    lamport = built.max_lamport_bytes // ranks
    limit = min(built.max_message_bytes, lamport if algorithm == "one_shot" else 1 << 40)
    tokens = limit // (2 * hidden)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (ranks, tokens, hidden), jnp.bfloat16)
    residual = jax.random.normal(keys[1], (tokens, hidden), jnp.bfloat16)
    norm_scale = jnp.ones(hidden, jnp.bfloat16)
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
    tokens = support.MAX_MESSAGE_BYTES // (2 * 5376) + 1
    x = jnp.zeros((2, tokens, 5376), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="at most 268435456 bytes a rank, got"):
        jax.jit(loopback_post_ff)(x, x[0], jnp.ones(5376, jnp.bfloat16)).block_until_ready()
    operands = [jnp.asarray(a) for a in make_inputs(Case(), 2).operands()]
    assert np.isfinite(np.asarray(loopback_post_ff(*operands)).astype(np.float32)).all()


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
        result = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == "2.0 2.0\n"
    assert list(tmp_path.glob("jit_loopback_post_ff*"))


GOOD_ATTRIBUTES = lowering.ffi_attributes("one_shot", np.arange(2)[None], 1e-6, 0.0)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"algorithm": "ring"}, "algorithm must be one_shot or two_shot, got ring"),
        ({"axis_size": np.int64(3)}, "axis_size must be 2, 4 or 8, got 3"),
        ({"replica_groups": np.arange(3)}, "whole groups of 2, got 3 ids"),
        ({"eps": np.float32(-1)}, "eps must be positive"),
        ({"max_ctas": np.int64(4)}, "max_ctas must be 0 or from 8 to 256, got 4"),
        ({"eps": None}, "number of attributes"),
    ],
)
def test_bad_attributes(attributes, message):
    """Each handler checks what it is given: an error, never a crash."""
    attributes = {k: v for k, v in (GOOD_ATTRIBUTES | attributes).items() if v is not None}
    operands = make_inputs(Case(), 2).operands()
    result = jax.ShapeDtypeStruct(operands[0].shape, BF16)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.ffi.ffi_call(lowering.LOOPBACK_TARGET, result)(*operands, **attributes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.ones((2, 3, 100), BF16)}, "multiple of 64 from 256 to 16384, got 100"),
        ({0: np.ones((2, 3, 640), np.int8)}, "x must be bfloat16, float16 or float32"),
        ({1: np.ones((2, 640), BF16)}, "residual must have 1920 elements, got 1280"),
        ({2: np.ones(639, BF16)}, "norm_scale must have 640 elements, got 639"),
        ({3: np.ones(2, BF16)}, "layer_scalar must have 1 elements, got 2"),
    ],
)
def test_bad_operands(change, message):
    operands = make_inputs(Case(), 2).operands()
    for index, operand in change.items():
        operands[index] = operand
    result = jax.ShapeDtypeStruct((2, 3, 640), BF16)
    call = jax.ffi.ffi_call(lowering.LOOPBACK_TARGET, result)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*map(jnp.asarray, operands), **GOOD_ATTRIBUTES))
