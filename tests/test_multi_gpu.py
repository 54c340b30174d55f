"""What only a real mesh of GPUs can show: one launch a device, graphs, errors on every rank.

Selected by `pytest -k multi_gpu`, with the multi_gpu cases of the other files.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16, F16, F32, Case, assert_matches, make_inputs, oracle_float64
from jax.sharding import PartitionSpec as P
from profiles import kernels_in
from runners import make_mesh

import jax_gemma_arf as jga
from jax_gemma_arf import lowering, support

pytestmark = pytest.mark.usefixtures("built")
SPECS = (P("tp"), P(), P(), P())


@pytest.fixture(params=[2, 4, 8])
def tp(request, require_gpus):
    return make_mesh((request.param,), ("tp",), require_gpus(request.param))


def place(mesh, case):
    operands = make_inputs(case, mesh.size).operands()
    return [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(operands, SPECS)]


def chain(mesh, length, **options):
    """Each link's partial sums are the last link's output, on every rank."""

    def local(x, *others):
        x = x[0]
        for _ in range(length):
            out = jga.fused_post_ff(x, *others, axis_name="tp", implementation="cuda", **options)
            x = jax.lax.pcast(out, "tp", to="varying")
        return x[None]

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=SPECS, out_specs=P("tp")))


def test_graph_replay(tp, built):
    """Captured by XLA by default, replayed without another call of Execute."""
    call, operands = chain(tp, 20), place(tp, Case((16,), 2560))
    first = np.asarray(call(*operands))
    for _ in range(4):
        call(*operands).block_until_ready()
    before = built.enqueued_launches()
    for _ in range(20):
        np.testing.assert_array_equal(
            np.asarray(call(*operands)).view(np.uint8), first.view(np.uint8)
        )
    assert built.enqueued_launches() - before <= 5 * 20 * tp.size


def test_alternating_sizes(tp):
    """Hazards 5, 6 and 14 to 16, as in loopback: random order over shared workspaces."""
    rng = np.random.default_rng(0)
    calls = []
    for dtype in (BF16, F16, F32):
        for tokens in (1, 3, 32, 131, 2048):
            case = Case((tokens,), int(rng.choice([640, 2816, 5376])), dtype)
            call, operands = chain(tp, 1), place(tp, case)
            first = call(*operands)
            inputs = make_inputs(case, tp.size)
            expected = oracle_float64(case, inputs)
            assert_matches(case, inputs, np.asarray(first)[0], expected, exact_sum=True)
            calls.append((functools.partial(call, *operands), first))
    differs = jax.jit(lambda one, two: jnp.any(one != two))
    wrong = [
        differs(call(), first)
        for call, first in (calls[i] for i in rng.integers(len(calls), size=400))
    ]
    assert not np.any(jax.device_get(wrong))


def test_error_reaches_every_rank(tp):
    """Hazard 15: a message above the cap fails in Initialize on all ranks, without a hang,
    and the next call works."""
    groups = support.replica_groups(tp, ("tp",))
    attributes = lowering.ffi_attributes("two_shot", groups, 1e-6, 0.0)
    tokens = support.MAX_MESSAGE_BYTES // (2 * 5376) + 1
    result = jax.ShapeDtypeStruct((tokens, 5376), BF16)

    def local(x, norm_scale):
        return jax.ffi.ffi_call(lowering.MESH_TARGET, result)(x, x, norm_scale, **attributes)

    mapped = jax.shard_map(local, mesh=tp, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    replicated = jax.NamedSharding(tp, P())
    x = jax.device_put(jnp.zeros(result.shape, BF16), replicated)
    norm_scale = jax.device_put(jnp.ones(5376, BF16), replicated)
    with pytest.raises(jax.errors.JaxRuntimeError, match="at most 268435456 bytes a rank"):
        jax.block_until_ready(jax.jit(mapped)(x, norm_scale))

    case = Case((3,), 640)
    inputs = make_inputs(case, tp.size)
    out = np.asarray(chain(tp, 1)(*place(tp, case)))[0]
    assert_matches(case, inputs, out, oracle_float64(case, inputs), exact_sum=True)


def test_one_launch_a_call(tp, tmp_path):
    """The profile of a call holds one kernel a device, and no other collective."""
    call, operands = chain(tp, 1), place(tp, Case((16,), 5376))
    call(*operands).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            call(*operands).block_until_ready()
    kernels = kernels_in(tmp_path)
    assert len(kernels) == 3 * tp.size, kernels
    assert all("oneshot" in name for name in kernels), kernels
