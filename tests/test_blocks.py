"""jax_gemma_arf.linen and jax_gemma_arf.nnx: parameter names, values against plain arithmetic."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

from helpers.cases import OPS, Case, make_inputs, rmsnorm
from helpers.runners import call_op, in_specs, make_mesh, one_rank
from jax_gemma_arf import linen
from jax_gemma_arf import nnx as blocks_nnx

FEATURES, HIDDEN = 256, 64


def weights(scale_offset: float) -> dict:
    """The parameters of FeedForward, float32."""
    rng = np.random.default_rng(0)
    shapes = {
        "pre_ffw_norm": {"scale": (FEATURES,)},
        "mlp": {"gating_einsum": (2, HIDDEN, FEATURES), "linear": (HIDDEN, FEATURES)},
        "post_ffw_norm": {"scale": (FEATURES,)},
        "skip_scale": (1,),
    }
    return jax.tree.map(
        lambda shape: (
            (0.1 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
            - np.float32(scale_offset * (len(shape) == 1))
        ),
        shapes,
        is_leaf=lambda a: isinstance(a, tuple),
    )


def expected_mlp(x, p):
    gate, up = (x @ w.T for w in p["gating_einsum"].astype(np.float64))
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * up) @ p["linear"]


def make_linen(name, **options):
    """(function of weights and inputs, parameter specs)."""
    module = getattr(linen, name)(HIDDEN, "tp", **options)
    return lambda p, *args: module.apply({"params": p}, *args), module.param_specs()


def make_nnx(name, **options):
    module = getattr(blocks_nnx, name)(
        FEATURES, HIDDEN, axis_name="tp", dtype=jnp.float32, rngs=nnx.Rngs(0), **options
    )
    graph, _ = nnx.split(module)

    def call(p, *args):
        state = nnx.State(jax.tree.map(nnx.Param, p))
        return nnx.merge(graph, state)(*args)

    specs = jax.tree.map(lambda a: a.get_value(), module.param_specs(), is_leaf=is_param)
    return call, nnx.to_pure_dict(specs)


def is_param(node):
    return isinstance(node, nnx.Param)


both = pytest.mark.parametrize("make", [make_linen, make_nnx])


REPLICATED = P()


def run(mesh, call, specs, p, *args, out_specs=REPLICATED):
    mapped = jax.shard_map(
        call, mesh=mesh, in_specs=(specs, *(P() for _ in args)), out_specs=out_specs
    )
    return jax.tree.map(np.asarray, jax.jit(mapped)(p, *args))


@both
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mlp(make, ranks, cpus):
    mesh = make_mesh((ranks,), ("tp",), cpus[:ranks])
    p = weights(0)["mlp"]
    x = np.random.default_rng(1).standard_normal((3, FEATURES)).astype(np.float32)
    np.testing.assert_allclose(run(mesh, *make("MLP"), p, x), expected_mlp(x, p), atol=1e-4)

    # Partial sums: none is the result where there are several ranks, all together are.
    call, specs = make("MLP", skip_all_reduce=True)
    parts = run(mesh, lambda *a: call(*a)[None], specs, p, x, out_specs=P("tp"))
    np.testing.assert_allclose(parts.sum(0), expected_mlp(x, p), atol=1e-4)
    assert ranks == 1 or np.abs(parts - expected_mlp(x, p)).max() > 0.1


@both
@pytest.mark.parametrize("layer_scalar", [True, False])
@pytest.mark.parametrize("scale_offset", [0.0, 1.0])
def test_feed_forward(make, scale_offset, layer_scalar, mesh):
    p = weights(scale_offset)
    if not layer_scalar:
        del p["skip_scale"]
    rng = np.random.default_rng(1)
    h = rng.standard_normal((3, FEATURES)).astype(np.float32)
    next_scale = rng.standard_normal(FEATURES).astype(np.float32)
    options = {"scale_offset": scale_offset, "layer_scalar": layer_scalar}
    call, specs = make("FeedForward", **options)

    pre, post = (scale_offset + p[name]["scale"] for name in ("pre_ffw_norm", "post_ffw_norm"))
    want = (rmsnorm(expected_mlp(rmsnorm(h, pre), p["mlp"]), post) + h) * p.get("skip_scale", 1)
    np.testing.assert_allclose(run(mesh, call, specs, p, h), want, atol=1e-4)
    hidden, normed = run(mesh, call, specs, p, h, next_scale)
    np.testing.assert_allclose(hidden, want, atol=1e-4)
    np.testing.assert_allclose(normed, rmsnorm(want, scale_offset + next_scale), atol=1e-4)


def test_names_are_the_official_ones():
    """And init makes the hidden units of all ranks, with norms that start as 1."""
    h = jnp.zeros((3, FEATURES))
    params = linen.FeedForward(HIDDEN, "tp", scale_offset=1.0).init(jax.random.key(0), h)["params"]
    shapes = jax.tree.map(lambda a: a.shape, params)
    assert shapes == jax.tree.map(lambda a: a.shape, weights(0))
    assert not np.any(np.asarray(params["pre_ffw_norm"]["scale"]))
    module = blocks_nnx.FeedForward(FEATURES, HIDDEN, axis_name="tp", rngs=nnx.Rngs(0))
    pure = nnx.to_pure_dict(nnx.state(module))
    assert jax.tree.map(lambda a: a.shape, pure) == shapes
    assert (pure["pre_ffw_norm"]["scale"] == 1).all()


@both
def test_indivisible_hidden_units(make, cpus):
    mesh = make_mesh((3,), ("tp",), cpus[:3])
    call, _ = make("MLP")
    with pytest.raises(ValueError, match=r"hidden_dim must be divisible by the 3 ranks.*got 64"):
        run(mesh, call, P(), weights(0)["mlp"], np.zeros((3, FEATURES), np.float32))


def test_parameters_of_all_ranks(mesh):
    """Each rank would reduce the whole MLP."""
    call, _ = make_nnx("MLP")
    with pytest.raises(ValueError, match="this rank's 32 of 64 hidden units, got 64; shard them"):
        run(mesh, call, P(), weights(0)["mlp"], np.zeros((3, FEATURES), np.float32))


@pytest.mark.parametrize("next_norms", [None, 1, 2])
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: functools.partial(jax.eval_shape, f)])
def test_init_returns_what_apply_does(mesh, wrap, next_norms):
    """In structure, shape and dtype, so that a parent can unpack it; h has two rows on purpose."""
    h = jnp.ones((2, FEATURES), jnp.bfloat16)
    scale = jnp.ones(FEATURES, jnp.bfloat16)
    args = (h,) if next_norms is None else (h, scale if next_norms == 1 else (scale,) * next_norms)
    module = linen.FeedForward(HIDDEN, "tp")
    made, variables = wrap(module.init_with_output)(jax.random.key(0), *args)
    specs = ({"params": module.param_specs()}, *(P() for _ in args))
    mapped = jax.shard_map(module.apply, mesh=mesh, in_specs=specs, out_specs=P())
    applied = jax.eval_shape(mapped, variables, *args)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, applied)
    assert jax.tree.structure(made) == jax.tree.structure(applied)
    assert {a.dtype for a in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("module", [linen, blocks_nnx], ids=lambda module: module.__name__)
@pytest.mark.parametrize("context", [contextlib.nullcontext, jax.set_mesh], ids=["none", "mesh"])
def test_example_on_a_default_mesh(module, context, cpus):
    """The code in the docstring, where jax.make_mesh makes the mesh."""
    mesh = jax.make_mesh((2,), ("tp",), devices=cpus[:2])
    h = np.random.default_rng(0).standard_normal((3, FEATURES)).astype(np.float32)
    block = linen.FeedForward(HIDDEN, "tp")
    if module is blocks_nnx:
        options = {"axis_name": "tp", "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        block = blocks_nnx.FeedForward(FEATURES, HIDDEN, **options)
    names = {"block": block, "mesh": mesh, "h": h, "jax": jax, "nnx": nnx, "P": P}
    names["functools"] = functools
    code = "\n".join(line[4:] for line in module.__doc__.splitlines() if line.startswith("    "))
    with context(mesh):
        exec(code, names)
    p = names["variables"]["params"] if module is linen else nnx.to_pure_dict(names["state"])
    p = jax.tree.map(np.asarray, p)
    want = rmsnorm(expected_mlp(rmsnorm(h, p["pre_ffw_norm"]["scale"]), p["mlp"]), 1.0) + h
    np.testing.assert_allclose(names["out"], want, atol=1e-4)


def test_a_parent_that_unpacks(mesh):
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, h):
            scale = self.param("next_norm", nn.initializers.ones, (FEATURES,))
            hidden, normed = linen.FeedForward(HIDDEN, "tp", name="ff")(h, scale)
            assert hidden.shape == normed.shape == h.shape
            return hidden + normed

    h = jnp.ones((3, FEATURES))
    assert "next_norm" in Parent().tabulate(jax.random.key(0), h)
    variables = Parent().init(jax.random.key(0), h)
    ff = linen.FeedForward(HIDDEN, "tp").param_specs()
    specs = {"params": {"ff": ff, "next_norm": P()}}
    run(mesh, Parent().apply, specs, variables, h)


class Stack(nn.Module):
    """Three blocks in nn.scan; options are nn.scan's."""

    block: type[nn.Module]
    options: tuple = ()

    @nn.compact
    def __call__(self, h):
        scan = nn.scan(
            lambda block, h, _: (block(h), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            **dict(self.options),
        )
        return scan(self.block(HIDDEN, "tp", name="ff"), h, None)[0]


NO_CHECK = (("check_constancy_invariants", False),)


@pytest.mark.parametrize("block", [linen.FeedForward, nn.remat(linen.FeedForward)])
@pytest.mark.parametrize(
    ("options", "check_vma"), [(NO_CHECK, True), (NO_CHECK, False), ((), False)]
)
def test_scan_of_linen(mesh, block, options, check_vma):
    """The parameters of the layers are stacked, and param_specs says so."""
    h = jax.random.normal(jax.random.key(1), (3, FEATURES))
    stack = Stack(block, options)
    variables = stack.init(jax.random.key(0), h)
    feed_forward = linen.FeedForward(HIDDEN, "tp")
    stacked = {"params": {"ff": feed_forward.param_specs(stacked=1)}}
    mapped = functools.partial(jax.shard_map, mesh=mesh, out_specs=P(), check_vma=check_vma)
    got = jax.jit(mapped(stack.apply, in_specs=(stacked, P())))(variables, h)
    one = jax.jit(
        mapped(feed_forward.apply, in_specs=({"params": feed_forward.param_specs()}, P()))
    )
    want = h
    for layer in range(3):
        params = jax.tree.map(lambda a: a[layer], variables["params"]["ff"])  # noqa: B023
        want = one({"params": params}, want)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_scan_that_drops_manual_axes(mesh, op):
    """Flax's default traces the body again with types that every operation refuses; the error says
    what to pass to nn.scan."""
    case = Case((3,), FEATURES, op=op, next_norms=int(op == "sandwich"))

    class Body(nn.Module):
        @nn.compact
        def __call__(self, h, inputs):
            return h + call_op(case, inputs, axis_name="tp")[0].sum().astype(h.dtype), None

    def local(options, inputs):
        inputs = jax.tree.map(lambda a: a[None], one_rank(inputs))
        scan = nn.scan(Body, length=1, **dict(options))
        return scan().apply({}, jnp.zeros(()), inputs)[0]

    def call(options):
        body = functools.partial(local, options)
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(in_specs(case),), out_specs=P())
        return jax.jit(mapped)(make_inputs(case, 2))

    with pytest.raises(
        ValueError, match=r"must hold partial sums.*check_constancy_invariants=False"
    ):
        call(())
    assert np.isfinite(call(NO_CHECK))


@pytest.mark.parametrize("axes", [1, 2])
def test_param_specs_of_stacked_nnx(axes):
    """Axes in front are sharded over none, in both modules; the layers run in nnx.scan."""

    def make(name):
        def one(rngs):
            options = {"axis_name": "tp", "dtype": jnp.float32, "rngs": rngs}
            return getattr(blocks_nnx, name)(FEATURES, HIDDEN, **options)

        create, rngs = one, nnx.Rngs(0)
        for _ in range(axes):
            create = nnx.split_rngs(splits=2)(nnx.vmap(create))
        return create(rngs)

    front = (None,) * axes
    mlp = {"gating_einsum": P(*front, None, "tp"), "linear": P(*front, "tp")}
    for name, want in (("MLP", mlp), ("FeedForward", {"mlp": mlp})):
        got = nnx.to_pure_dict(make(name).param_specs())
        assert got | want == got, got
        assert set(jax.tree.leaves(got)) <= {*mlp.values(), P()}


def test_scan_of_nnx(mesh):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        options = {"axis_name": "tp", "dtype": jnp.float32, "rngs": rngs}
        return blocks_nnx.FeedForward(FEATURES, HIDDEN, **options)

    layers = make(nnx.Rngs(0))
    graph, state = nnx.split(layers)
    h = jax.random.normal(jax.random.key(1), (3, FEATURES))

    def call(state, h):
        scan = nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(h, nnx.merge(graph, state))

    got = run(mesh, call, layers.param_specs(), state, h)
    want = np.asarray(h, np.float64)
    for layer in range(3):
        p = jax.tree.map(lambda a: np.asarray(a[layer]), nnx.to_pure_dict(state))  # noqa: B023
        normed = rmsnorm(want, p["pre_ffw_norm"]["scale"])
        want = rmsnorm(expected_mlp(normed, p["mlp"]), p["post_ffw_norm"]["scale"]) + want
    np.testing.assert_allclose(got, want, atol=1e-4)

    with pytest.raises(ValueError, match=r"this rank's 32 of 64 .*got 3, 32; .*nnx\.scan"):
        run(mesh, lambda s, h: nnx.merge(graph, s).mlp(h), layers.param_specs(), state, h)


@pytest.mark.parametrize("next_norm", [False, True])
def test_to_linen(mesh, next_norm):
    """nnx.bridge's init calls the module outside of shard_map, too."""
    module = nnx.bridge.to_linen(
        blocks_nnx.FeedForward, FEATURES, HIDDEN, axis_name="tp", dtype=jnp.float32
    )
    h = jax.random.normal(jax.random.key(1), (2, FEATURES))
    args = (h, jnp.ones(FEATURES)) if next_norm else (h,)
    made, variables = module.init_with_output(jax.random.key(0), *args)
    assert jax.tree.map(jnp.shape, made) == ((h.shape,) * 2 if next_norm else h.shape)
    specs = {"params": linen.FeedForward(HIDDEN, "tp").param_specs()}
    got = run(mesh, module.apply, specs, variables, *args)
    assert jax.tree.map(np.shape, got) == jax.tree.map(jnp.shape, made)


@both
@pytest.mark.parametrize("name", ["MLP", "FeedForward"])
def test_outside_shard_map(make, name):
    call, _ = make(name)
    p = weights(0) if name == "FeedForward" else weights(0)["mlp"]
    with pytest.raises(ValueError, match=r"got 'tp' where there is no such axis.*jax\.shard_map"):
        call(p, jnp.ones((3, FEATURES)))
