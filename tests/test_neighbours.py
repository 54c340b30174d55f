"""The tails among XLA's own kernels: a small model, whose matmuls come right before and right after
them, in loopback and over a mesh of GPUs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.cases import BF16
from helpers.places import GRAPHS, NO_GRAPHS, Place, same_bits
from helpers.runners import place
from jax_gemma_arf._src import blocks, decision, extension
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_tail

LAYERS, TOKENS, FEATURES, HIDDEN = 4, 16, 1536, 512


class Layer(NamedTuple):
    """An MLP and its tail. What differs between ranks has an axis of ranks, [N, ...]."""

    gating_einsum: Any  # [N, 2, HIDDEN, FEATURES]
    linear: Any  # [N, HIDDEN, FEATURES]
    norm_scale: Any  # [FEATURES]
    next_norm_scale: Any  # [FEATURES]


class State(NamedTuple):
    """State that one layer hands to the next."""

    hidden: Any  # [TOKENS, FEATURES]
    normed: Any  # [N, TOKENS, FEATURES]: what each rank has computed


LAYER_SPECS = Layer(P("tp"), P("tp"), P(), P())
STATE_SPECS = State(P(), P("tp"))


def on(where: Place, tree, specs):
    """NumPy arrays on the devices of a place."""
    if where.mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return place(where.mesh, tree, specs)


def mapped(where: Place, function, in_specs, out_specs, **options):
    """A function of the ranks that a device holds, all of them in loopback, as one of arrays."""
    if where.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=where.mesh, in_specs=in_specs, out_specs=out_specs, **options
    )


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
    too early would be the result of the run before."""
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


def slow_producer(x: jax.Array, rounds: jax.Array) -> jax.Array:
    """x, by a kernel that lets its successor start at once and then takes its time.

    Args:
      x: [rows, FEATURES].
      rounds: [1], int32, even: how long it takes, some nanoseconds each.
    """

    def kernel(rounds_ref, x_ref, out_ref):
        inline = functools.partial(
            triton.elementwise_inline_asm,
            constraints="=r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x_ref.shape, jnp.float32)],
        )
        negate = "neg.f32 $0, $1;"  # the compiler does not look into it
        row = x_ref[...].astype(jnp.float32)
        # The successor of this kernel may rely on what was there before it.
        start_successor = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;"
        (row,) = inline(start_successor, args=[row])
        row = jax.lax.fori_loop(0, rounds_ref[0], lambda _, row: inline(negate, args=[row])[0], row)
        out_ref[...] = row.astype(out_ref.dtype)

    block = pl.BlockSpec((1, 512), lambda i, j: (i, j))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0], x.shape[1] // 512),
        in_specs=[pl.BlockSpec((1,), lambda i, j: (0,)), block],
        out_specs=block,
        compiler_params=triton.CompilerParams(num_warps=4),
        name="slow_producer",
    )(rounds, x)


class Link(NamedTuple):
    """Values that one link of a chain hands to the next. Each rank has its own partial sums."""

    partial_sums: Any  # [N, tokens, FEATURES]
    hidden: Any  # [tokens, FEATURES]


LINK_SPECS = Link(P("tp"), P())


def produce(link: Link, rounds: jax.Array) -> Link:
    """Both operands that the tail reads first are written late. rounds: [N, 1]."""
    ranks, *shape = link.partial_sums.shape
    rows = link.partial_sums.reshape(-1, FEATURES)
    return Link(
        slow_producer(rows, rounds[0]).reshape(ranks, *shape),
        slow_producer(link.hidden, rounds[0]),
    )


def finish(where: Place, layer: Layer, link: Link) -> State:
    return tail(where, layer, link.partial_sums, State(link.hidden, link.partial_sums))


def consume(state: State) -> Link:
    """Runs right behind the tail, as kernels of XLA; exact in bfloat16."""
    return Link(-0.5 * state.normed, 0.5 * state.hidden)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize(
    "options", [pytest.param(GRAPHS, id="graphs"), pytest.param(NO_GRAPHS, id="no_graphs")]
)
def test_slow_producer_and_early_consumer(where, built, options, algorithm):
    """Hazards 3 and 4, at their worst: the kernel in front of each tail lets the tail start before
    it has written anything, and XLA starts the kernel behind as soon as the tail lets it. One rank
    is slower than another. Other data in every run, as above."""
    tokens = TOKENS
    kind = decision.device_kind(decision.client_of(where.mesh) if where.mesh else None)
    while decision.choose_algorithm(where.ranks, 2 * tokens * FEATURES, kind=kind) != algorithm:
        tokens *= 2
    layer = make_layers(where)[0]
    rng = np.random.default_rng(0)

    def make_link() -> Link:
        partial_sums = rng.standard_normal((where.ranks, tokens, FEATURES), np.float32)
        hidden = rng.standard_normal((tokens, FEATURES), np.float32)
        return on(where, Link(partial_sums.astype(BF16), hidden.astype(BF16)), LINK_SPECS)

    rounds = 1000 * np.arange(1, where.ranks + 1, dtype=np.int32)[:, None] * 2
    rounds = on(where, rounds, P("tp"))

    def local(layer: Layer, link: Link, rounds: jax.Array) -> Link:
        for _ in range(LAYERS):
            link = consume(finish(where, layer, produce(link, rounds)))
        return link

    def jit(function, in_specs, out_specs, **compiler_options):
        # Pallas does not say what its results vary over.
        function = mapped(where, function, in_specs, out_specs, check_vma=False)
        return jax.jit(function, compiler_options=compiler_options)

    chain = jit(local, (LAYER_SPECS, LINK_SPECS, P("tp")), LINK_SPECS, **options)
    jit_produce = jit(produce, (LINK_SPECS, P("tp")), LINK_SPECS)
    jit_finish = jit(functools.partial(finish, where), (LAYER_SPECS, LINK_SPECS), STATE_SPECS)
    jit_consume = jit(consume, (STATE_SPECS,), LINK_SPECS)

    def one_by_one(link: Link) -> Link:
        for _ in range(LAYERS):
            link = jax.block_until_ready(jit_produce(link, rounds))
            state = jax.block_until_ready(jit_finish(layer, link))
            link = jax.block_until_ready(jit_consume(state))
        return link

    links = [make_link() for _ in range(4)]
    expected = [one_by_one(link) for link in links]
    before = built.recorded_launches()
    for i in rng.integers(len(links), size=50):
        same_bits(chain(layer, links[i], rounds), expected[i])
    recorded = built.recorded_launches() - before
    assert (recorded > 0) == (extension.RECORD and where.mesh is not None and options is GRAPHS)
