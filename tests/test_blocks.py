"""jax_gemma_arf.linen and jax_gemma_arf.nnx: parameter names, values against plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from runners import make_mesh

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


def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale


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
    want = (norm(expected_mlp(norm(h, pre), p["mlp"]), post) + h) * p.get("skip_scale", 1)
    np.testing.assert_allclose(run(mesh, call, specs, p, h), want, atol=1e-4)
    hidden, normed = run(mesh, call, specs, p, h, next_scale)
    np.testing.assert_allclose(hidden, want, atol=1e-4)
    np.testing.assert_allclose(normed, norm(want, scale_offset + next_scale), atol=1e-4)


def test_names_are_the_official_ones():
    """And init makes the hidden units of all ranks, with norms that start as 1."""
    h = jnp.zeros((3, FEATURES))
    params = linen.FeedForward(HIDDEN, "tp", scale_offset=1.0).init(jax.random.key(0), h)["params"]
    shapes = jax.tree.map(lambda a: a.shape, params)
    assert shapes == jax.tree.map(lambda a: a.shape, weights(0))
    assert not params["pre_ffw_norm"]["scale"].any()
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
def test_init_has_the_structure_of_apply(next_norms):
    """A parent that unpacks the results does so in init, too."""
    module = linen.FeedForward(HIDDEN, "tp")
    scale = jnp.ones(FEATURES)
    scales = {None: None, 1: scale, 2: (scale, scale)}[next_norms]
    h = jnp.ones((2, 3, FEATURES))
    out, _ = module.init_with_output(jax.random.key(0), h, scales)
    expected = {None: h, 1: (h, h), 2: (h, (h, h))}[next_norms]
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, expected)


def test_specs_of_stacked_modules():
    """Axes that nnx.vmap and nn.scan put in front are sharded over none."""
    specs = linen.MLP(HIDDEN, "tp").param_specs(stacked=1)
    assert specs == {"gating_einsum": P(None, None, "tp"), "linear": P(None, "tp")}

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return blocks_nnx.MLP(FEATURES, HIDDEN, axis_name="tp", dtype=jnp.float32, rngs=rngs)

    stacked = create(nnx.Rngs(0))
    specs = dict(nnx.to_flat_state(stacked.param_specs()))
    found = {path[-1]: spec.get_value() for path, spec in specs.items()}
    assert found == {"gating_einsum": P(None, None, "tp"), "linear": P(None, "tp")}


@pytest.mark.parametrize("name", ["MLP", "FeedForward"])
def test_outside_shard_map(name):
    module = getattr(linen, name)(HIDDEN, "tp")
    x = jnp.ones((2, FEATURES))
    params = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        module.apply(params, x)
