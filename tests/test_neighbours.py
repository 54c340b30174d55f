"""The tails among XLA's own kernels: a small model, whose matmuls come right before and right after
them, in loopback and over a mesh of GPUs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16
from jax.sharding import PartitionSpec as P
from places import GRAPHS, NO_GRAPHS, Place, same_bits

import jax_gemma_arf as jga
from jax_gemma_arf import blocks
from jax_gemma_arf.loopback import loopback_tail
from jax_gemma_arf.reference import Operands

LAYERS, TOKENS, FEATURES, HIDDEN = 4, 16, 1536, 512


class Layer(NamedTuple):
    """An MLP and its tail. What differs between ranks has an axis of ranks, [N, ...]."""

    gating_einsum: jax.Array  # [N, 2, HIDDEN, FEATURES]
    linear: jax.Array  # [N, HIDDEN, FEATURES]
    norm_scale: jax.Array  # [FEATURES]
    next_norm_scale: jax.Array  # [FEATURES]


class State(NamedTuple):
    """What one layer hands to the next."""

    hidden: jax.Array  # [TOKENS, FEATURES]
    normed: jax.Array  # [N, TOKENS, FEATURES]: what each rank has computed


LAYER_SPECS = Layer(P("tp"), P("tp"), P(), P())
STATE_SPECS = State(P(), P("tp"))


def on(where: Place, tree, specs):
    """NumPy arrays on the devices of a place."""
    if where.mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    shardings = jax.tree.map(functools.partial(jax.NamedSharding, where.mesh), specs)
    return jax.device_put(tree, shardings)


def mapped(where: Place, function, in_specs, out_specs):
    """A function of the ranks that a device holds, all of them in loopback, as one of arrays."""
    if where.mesh is None:
        return function
    return jax.shard_map(function, mesh=where.mesh, in_specs=in_specs, out_specs=out_specs)


def make_layers(where: Place) -> list[Layer]:
    rng = np.random.default_rng(0)

    def layer() -> Layer:
        gating_einsum = rng.standard_normal((where.ranks, 2, HIDDEN, FEATURES), np.float32)
        linear = rng.standard_normal((where.ranks, HIDDEN, FEATURES), np.float32)
        scales = 1 + rng.standard_normal((2, FEATURES), np.float32) / 4
        arrays = Layer(FEATURES**-0.5 * gating_einsum, linear, *scales)
        return on(where, jax.tree.map(lambda a: a.astype(BF16), arrays), LAYER_SPECS)

    return [layer() for _ in range(LAYERS)]


def make_state(where: Place, seed: int) -> State:
    row = np.random.default_rng(seed).standard_normal((TOKENS, FEATURES)).astype(BF16)
    return on(where, State(row, np.stack([row] * where.ranks)), STATE_SPECS)


def mlp(layer: Layer, state: State) -> jax.Array:
    """Partial sums [N, TOKENS, FEATURES]."""
    one_rank = functools.partial(blocks.mlp, axis_name="tp", skip_all_reduce=True)
    return jax.vmap(one_rank)(state.normed, layer.gating_einsum, layer.linear)


def tail(where: Place, layer: Layer, partial_sums: jax.Array, state: State) -> State:
    if where.mesh is None:
        hidden, normed = loopback_tail(
            Operands(
                (partial_sums,),
                (layer.norm_scale,),
                state.hidden,
                next_norm_scales=(layer.next_norm_scale,),
            )
        )
        return State(hidden[-1], normed)
    hidden, normed = jga.fused_sandwich(
        partial_sums[0],
        state.hidden,
        layer.norm_scale,
        next_norm_scale=layer.next_norm_scale,
        axis_name="tp",
        implementation="cuda",
    )
    return State(hidden, normed[None])


def model(where: Place):
    """From layers and a state to the next state."""

    def local(layers: list[Layer], state: State) -> State:
        for layer in layers:
            state = tail(where, layer, mlp(layer, state), state)
        return state

    return mapped(where, local, ([LAYER_SPECS] * LAYERS, STATE_SPECS), STATE_SPECS)


def one_by_one(where: Place):
    """The same, with every matmul and every tail in a program of its own, which has ended before
    the next one begins."""
    jit_mlp = jax.jit(mapped(where, mlp, (LAYER_SPECS, STATE_SPECS), P("tp")))
    specs = (LAYER_SPECS, P("tp"), STATE_SPECS)
    jit_tail = jax.jit(mapped(where, functools.partial(tail, where), specs, STATE_SPECS))

    def call(layers: list[Layer], state: State) -> State:
        for layer in layers:
            partial_sums = jax.block_until_ready(jit_mlp(layer, state))
            state = jax.block_until_ready(jit_tail(layer, partial_sums, state))
        return state

    return call


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param(GRAPHS, id="graphs"),
        pytest.param(NO_GRAPHS, id="no_graphs"),
        pytest.param({"xla_gpu_enable_triton_gemm": False}, id="cublas"),
        pytest.param(NO_GRAPHS | {"xla_gpu_enable_triton_gemm": False}, id="cublas_no_graphs"),
    ],
)
def test_matmuls_around_the_tails(where, options):
    """Hazards 3 and 4: a tail reads partial sums that are finished, and the next matmul rows that
    are, also where XLA's kernels are launched to overlap. Other data in every run: what was read
    too early would be that of the run before."""
    layers = make_layers(where)
    states = [make_state(where, seed) for seed in range(4)]
    call = jax.jit(model(where), compiler_options=options)
    reference = one_by_one(where)
    firsts = []
    for state in states:
        first = call(layers, state)
        for pair in zip(first, reference(layers, state)):
            # Autotuning may choose another matmul, whose sums are rounded to another bfloat16.
            got, want = (np.asarray(a).astype(np.float32) for a in pair)
            np.testing.assert_allclose(got, want, rtol=2**-5, atol=2**-3)
        same_bits(first.normed[0], first.normed[-1])
        firsts.append(first)
    order = np.random.default_rng(0).integers(len(states), size=100)
    for out, i in [(call(layers, states[i]), i) for i in order]:
        same_bits(out, firsts[i])


def steps(where: Place, length: int):
    """So many steps of a decode loop in one program."""
    step = model(where)
    if length == 1:
        return step

    def loop(layers: list[Layer], state: State) -> State:
        return jax.lax.fori_loop(0, length, lambda _, state: step(layers, state), state)

    return loop


@pytest.mark.parametrize("length", [1, 8], ids=["step", "loop"])
def test_a_model_is_captured(where, built, length):
    """With XLA's default options: once a decode loop is warm, its calls are all replayed from CUDA
    graphs, whether the loop is Python's or the device's. The state is donated, so it stays where it
    is."""
    layers, state = make_layers(where), make_state(where, 0)
    decode = jax.jit(steps(where, length), donate_argnums=1)
    counts = [built.enqueued_launches()]
    for _ in range(30):
        state = jax.block_until_ready(decode(layers, state))
        counts.append(built.enqueued_launches())
    assert np.isfinite(np.asarray(state.hidden).astype(np.float32)).all()
    launches = LAYERS * where.ranks
    assert counts[1] - counts[0] >= launches
    # One call that is not captured would add 20 * where.ranks. XLA may capture all once more.
    assert counts[-1] - counts[10] <= launches, np.diff(counts)
