"""Tests that need a real mesh of GPUs: one launch a device, graphs, errors on every rank.

Selected by `pytest -k multi_gpu`, with the multi_gpu cases of the other files.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xplane
from jax.sharding import PartitionSpec as P

from helpers.cases import BF16, F16, F32, OPS, Case, assert_matches, make_inputs
from helpers.places import GRAPHS, NO_GRAPHS, same_bits
from helpers.runners import call_op, in_specs, make_mesh, mesh_call, one_rank, place
from jax_gemma_arf._src import extension, lowering
from jax_gemma_arf._src.mesh import replica_groups
from jax_gemma_arf._src.operands import MAX_MESSAGE_BYTES, Operands

pytestmark = pytest.mark.usefixtures("built")


@pytest.fixture(params=[2, 4, 8])
def tp(request, require_gpus):
    """GPUs along "tp" that have talked over NCCL: what hangs here is not this library's."""
    mesh = make_mesh((request.param,), ("tp",), require_gpus(request.param))
    psum = functools.partial(jax.lax.psum, axis_name="tp")
    total = jax.jit(jax.shard_map(psum, mesh=mesh, in_specs=P("tp"), out_specs=P()))
    assert total(jnp.ones(mesh.size)) == mesh.size
    return mesh


def inputs_on(mesh, case):
    return place(mesh, make_inputs(case, mesh.size), in_specs(case))


def kernel(case, mesh):
    """The case's kernel: what each rank holds of hidden and the next norms."""
    call = mesh_call(case, mesh, out_specs=P("tp"), every_rank=True, implementation="cuda")
    return jax.jit(call)


def chain(case, mesh, length):
    """Each link's partial sums are the last link's last output, on every rank."""

    def local(inputs):
        inputs = one_rank(inputs)
        x = inputs.partial_sums[0]
        for _ in range(length):
            *_, out = call_op(case, inputs, axis_name="tp", implementation="cuda")
            x = jax.lax.pcast(out, "tp", to="varying")
            inputs = inputs._replace(partial_sums=(x,) * case.branches)
        return x[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(in_specs(case),), out_specs=P("tp"))
    return jax.jit(mapped)


def check(case, mesh, outputs) -> None:
    first = [np.asarray(out)[0] for out in outputs]
    assert_matches(case, make_inputs(case, mesh.size), first, exact_sum=True)


@pytest.mark.parametrize(("op", "next_norms"), [("post_ff", 0), ("moe_tail", 1)])
def test_graph_replay(tp, built, op, next_norms):
    """In a CUDA graph by default, replayed without another call of Execute or Record."""
    case = Case((16,), 2560, op=op, next_norms=next_norms)
    call, inputs = chain(case, tp, 20), inputs_on(tp, case)
    first = np.asarray(call(inputs))
    for _ in range(4):
        call(inputs).block_until_ready()
    before = built.enqueued_launches()
    for _ in range(20):
        same_bits(call(inputs), first)
    assert built.enqueued_launches() - before <= 5 * 20 * tp.size


@pytest.mark.parametrize("tokens", [16, 2048])
@pytest.mark.parametrize("width", [2560, 16384], ids=["block", "cluster"])
def test_calls_are_recorded(tp, built, tokens, width):
    """A call in a CUDA graph is a kernel node that the record handler makes, and updates when
    buffers move: XLA captures nothing. Results equal the results of eager runs."""
    if not extension.RECORD:
        pytest.skip(f"needs {extension.RECORD_VARIABLE}=1")
    length = 4
    case = Case((tokens,), width, op="sandwich", next_norms=1)
    inputs = inputs_on(tp, case)
    lowered = chain(case, tp, length).lower(inputs)
    graph = lowered.compile(GRAPHS)
    expected = np.asarray(lowered.compile(NO_GRAPHS)(inputs))
    counts = []  # (recorded, all)
    for _ in range(8):
        counts.append((built.recorded_launches(), built.enqueued_launches()))
        moved = jax.tree.map(jnp.copy, inputs)  # elsewhere than the last ones
        same_bits(graph(moved), expected)
    counts.append((built.recorded_launches(), built.enqueued_launches()))
    assert counts[-1][0] - counts[0][0] >= length * tp.size
    # XLA may run a program once before it builds the graph.
    others = [all_launches - recorded for recorded, all_launches in counts]
    assert others[1] - others[0] in (0, length * tp.size), counts
    assert others[-1] == others[1], counts


def test_alternating_sizes(tp):
    """Hazards 5, 6 and 14 to 16, as in loopback: random order over shared workspaces."""
    rng = np.random.default_rng(0)
    calls = []
    for dtype in (BF16, F16, F32):
        for tokens in (1, 3, 32, 131, 2048):
            op = str(rng.choice(OPS))
            width = int(rng.choice([640, 2816, 5376]))
            case = Case((tokens,), width, dtype, op=op, next_norms=2 * (op == "sandwich"))
            call = functools.partial(kernel(case, tp), inputs_on(tp, case))
            first = call()
            check(case, tp, first)
            calls.append((call, first))
    differs = jax.jit(lambda one, two: jnp.any(one != two))
    picked = [calls[i] for i in rng.integers(len(calls), size=400)]
    wrong = [differs(*pair) for call, first in picked for pair in zip(call(), first)]
    assert not np.any(jax.device_get(wrong))


def test_error_reaches_every_rank(tp):
    """Hazard 15: a message above the cap fails in Initialize on all ranks, without a hang,
    and the next call works."""
    groups = replica_groups(tp, ("tp",))
    tokens = MAX_MESSAGE_BYTES // (2 * 5376) + 1
    result = jax.ShapeDtypeStruct((tokens, 5376), BF16)

    def local(x, norm_scale):
        operands = Operands((x,), (norm_scale,), residual=x)
        attributes = lowering.ffi_attributes(operands, "two_shot", groups, 1e-6, 0.0)
        call = jax.ffi.ffi_call(lowering.TARGET_NAME, result)
        return call(*jax.tree.leaves(operands), **attributes)

    mapped = jax.shard_map(local, mesh=tp, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    replicated = jax.NamedSharding(tp, P())
    x = jax.device_put(jnp.zeros(result.shape, BF16), replicated)
    norm_scale = jax.device_put(jnp.ones(5376, BF16), replicated)
    with pytest.raises(jax.errors.JaxRuntimeError, match="at most 268435456 bytes a rank"):
        jax.block_until_ready(jax.jit(mapped)(x, norm_scale))

    case = Case((3,), 640)
    check(case, tp, kernel(case, tp)(inputs_on(tp, case)))


@pytest.mark.parametrize("op", OPS)
def test_one_launch_a_call(tp, tmp_path, op):
    """The profile of a call holds one kernel a device, and no other collective."""
    case = Case((4,), 5376, op=op, next_norms=int(op == "sandwich"))  # one-shot for all ranks
    call = functools.partial(kernel(case, tp), inputs_on(tp, case))
    jax.block_until_ready(call())
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            jax.block_until_ready(call())
    kernels = [kernel.name for of_gpu in xplane.load(tmp_path).values() for kernel in of_gpu]
    assert len(kernels) == 3 * tp.size, kernels
    assert all("FusedTailOneShot" in name for name in kernels), kernels
