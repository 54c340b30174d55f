"""The official models for callers in either mode of a mesh, with and without a context mesh."""

import contextlib
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import gemma_models
from helpers import gemma_sizes as sizes
from helpers.gemma_models import text
from jax_gemma_arf import audit
from jax_gemma_arf.integrations.gemma import param_shardings, tensor_parallel

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
VARIANT, LAYERS, CACHE = "Gemma3", 1, 12
FAST = {"xla_backend_optimization_level": 0}  # these models are small


def loss_of(model):
    def loss(params, tokens, labels):
        logits = jax.nn.log_softmax(model.apply({"params": params}, tokens).logits)
        return -jnp.take_along_axis(logits, labels[..., None], axis=-1).mean()

    return loss


def decoded(model, params, tokens):
    """Two tokens after the first two, greedily, in a loop."""
    cache = model.init_cache(batch_size=len(tokens), dtype=jnp.float32, cache_length=CACHE)
    mask = jnp.broadcast_to(jnp.tri(2, CACHE) > 0, (len(tokens), 2, CACHE))
    positions = jnp.broadcast_to(jnp.arange(2), tokens.shape)
    inputs = {"cache": cache, "attention_mask": mask, "positions": positions}
    cache = model.apply({"params": params}, tokens, **inputs).cache

    def step(_, carry):
        token, cache = carry
        positions = cache["layer_0"]["end_index"][:, None]
        mask = jnp.arange(CACHE) <= positions[..., None]
        inputs = {"cache": cache, "attention_mask": mask, "positions": positions}
        out = model.apply({"params": params}, token, **inputs)
        return jnp.argmax(out.logits, axis=-1).astype(token.dtype), out.cache

    return jax.lax.fori_loop(0, 2, step, (tokens[:, -1:], cache))[0]


@functools.cache
def expected():
    """Loss, gradient and decoded tokens of the official model, and its parameters."""
    model, params = gemma_models.official(VARIANT, LAYERS), gemma_models.params(VARIANT, LAYERS)
    tokens, labels = sizes.tokens()[:, :4], sizes.tokens()[:, 1:5]
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(model)))(params, tokens, labels)
    return params, loss, gradient, jax.jit(functools.partial(decoded, model))(params, tokens[:, :2])


def in_mode(mesh, mode):
    return mesh.update(axis_types=(mode or AUTO,) * len(mesh.axis_names))


def context(mesh, mode):
    """jax.set_mesh of the mesh in a mode; None for no context."""
    return contextlib.nullcontext() if mode is None else jax.set_mesh(in_mode(mesh, mode))


@pytest.mark.parametrize(
    ("axes", "mode", "jitted", "tokens_on", "params_on"),
    [
        # Without a context JAX itself takes no gradient of arrays in Explicit mode outside of jit.
        (("tp",), None, True, None, None),
        (("tp",), None, True, EXPLICIT, EXPLICIT),
        (("tp",), EXPLICIT, False, None, None),
        (("tp",), EXPLICIT, True, None, AUTO),
        (("data", "tp"), AUTO, True, AUTO, EXPLICIT),
        (("data", "tp"), EXPLICIT, True, EXPLICIT, None),
    ],
)
def test_modes(axes, mode, jitted, tokens_on, params_on, cpus):
    """A loss, its gradient and a decode loop, on a default mesh; None is where nobody has placed
    tokens, and what param_shardings says of parameters."""
    host, *want = expected()
    mesh = jax.make_mesh((2,) * len(axes), axes, devices=cpus[: 2 ** len(axes)])
    batch_axis = "data" if "data" in axes else None
    official = gemma_models.official(VARIANT, LAYERS)
    model = tensor_parallel(official, mesh, batch_axis_name=batch_axis)

    def place(array, axis_type):
        return jax.device_put(array, NamedSharding(in_mode(mesh, axis_type), P(batch_axis)))

    def run(params, tokens, labels):
        found = jax.value_and_grad(loss_of(model))(params, tokens, labels)
        logits = model.apply({"params": params}, tokens).logits
        types.append(jax.typeof(logits).sharding)
        return *found, decoded(model, params, tokens[:, :2])

    types = []
    with context(mesh, mode):
        shardings = param_shardings(model)
        if params_on is not None:
            typed = in_mode(mesh, params_on)
            shardings = jax.tree.map(lambda s: NamedSharding(typed, s.spec), shardings)
        params = jax.device_put(host, shardings)
        tokens = sizes.tokens()[:, :4]
        if tokens_on is not None:
            tokens = place(tokens, tokens_on)
        labels = place(sizes.tokens()[:, 1:5], AUTO if mode is AUTO else EXPLICIT)
        run = jax.jit(run, compiler_options=FAST) if jitted else run
        loss, gradient, next_tokens = run(params, tokens, labels)
    np.testing.assert_allclose(loss, want[0], rtol=1e-5)
    largest = max(np.abs(a).max() for a in jax.tree.leaves(want[1]))
    close = functools.partial(np.testing.assert_allclose, atol=1e-4 * largest)
    jax.tree.map(close, gradient, want[1])
    np.testing.assert_array_equal(next_tokens, want[2])
    assert jax.tree.map(jax.typeof, gradient) == jax.tree.map(jax.typeof, params)
    # In Explicit mode the vocabulary is whole, so that labels can be looked up in it.
    if EXPLICIT in (mode, tokens_on):
        assert types == [NamedSharding(mesh.abstract_mesh, P(batch_axis, None, None))]
    else:
        assert not types[0].mesh.explicit_axes


def test_init(cpus):
    """Parameters and a cache are made on the caller's mesh, from tokens on it."""
    mesh = jax.make_mesh((2, 2), ("data", "tp"), devices=cpus[:4])
    model = tensor_parallel(gemma_models.official(VARIANT, LAYERS), mesh, batch_axis_name="data")
    with jax.set_mesh(mesh):
        shardings = param_shardings(model)
        tokens = jax.device_put(sizes.tokens(), NamedSharding(mesh, P("data")))
        init = functools.partial(model.init, tokens=tokens)
        params = jax.jit(lambda key: init(key)["params"], out_shardings=shardings)(
            jax.random.key(0)
        )
        cache = model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=CACHE)
        wanted = shardings, model.cache_shardings(cache)
    for array, sharding in zip(jax.tree.leaves((params, cache)), jax.tree.leaves(wanted)):
        assert array.sharding.mesh == sharding.mesh == mesh
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_auto_axes(cpus):
    """Keeps the logits split over the vocabulary in an Explicit context."""
    mesh = jax.make_mesh((2,), ("tp",), devices=cpus[:2])
    model = tensor_parallel(gemma_models.official(VARIANT, LAYERS), mesh)
    with jax.set_mesh(mesh):
        shapes = gemma_models.shapes(VARIANT, LAYERS)
        shapes = gemma_models.structs(shapes, param_shardings(model))
        labels = jax.ShapeDtypeStruct(sizes.tokens().shape, jnp.int32)

        def gathers(loss):
            compiled = jax.jit(loss).lower(shapes, labels, labels).compile()
            return [found.kind for found in audit(compiled)].count("all-gather")

        lookup = 1
        assert gathers(loss_of(model)) > lookup
        assert gathers(jax.sharding.auto_axes(loss_of(model), out_sharding=P())) == lookup


def test_other_meshes(cpus):
    """The first line says what is wrong, and what to write."""
    mesh = jax.make_mesh((2,), ("tp",), devices=cpus[:2])
    other = jax.make_mesh((4,), ("model",), devices=cpus[:4])
    model = tensor_parallel(gemma_models.official(VARIANT, LAYERS), mesh)
    params = {"params": jax.device_put(expected()[0], param_shardings(model))}
    tokens = sizes.tokens()
    wrong = r"must be the one that tensor_parallel was given, {'tp': 2}, got {'model': 4}; build"
    with jax.set_mesh(other), pytest.raises(ValueError, match=rf"the context \(.*\) {wrong}"):
        model.apply(params, tokens)
    placed = jax.device_put(tokens, NamedSharding(other, P()))
    with pytest.raises(ValueError, match=rf"the mesh of an argument {wrong}"):
        model.apply(params, placed)
    inside = jax.shard_map(
        lambda tokens: model.apply(params, tokens).logits, mesh=mesh, in_specs=P(), out_specs=P()
    )
    with pytest.raises(ValueError, match=r"outside of jax\.shard_map.*over \('tp',\)"):
        inside(tokens)


class Numbers:
    """A tokenizer of numbers."""

    VERSION = FORMAT = None
    FORBIDDEN_TOKENS = (5, 6)

    class special_tokens:
        EOS, END_OF_TURN, BEGIN_OF_TOOL_RESPONSE = 1, 3, 4

    def encode(self, prompt, add_bos):
        return [2] * add_bos + [int(word) for word in prompt.split()]

    def decode(self, tokens):
        return " ".join(map(str, np.asarray(tokens)))


@pytest.mark.parametrize(("axes", "mode"), [(("tp",), None), (("data", "tp"), EXPLICIT)])
def test_sampler(axes, mode, cpus):
    """The official one, on a default mesh."""
    mesh = jax.make_mesh((2,) * len(axes), axes, devices=cpus[: 2 ** len(axes)])
    batch_axis = "data" if "data" in axes else None
    official = gemma_models.official(VARIANT, LAYERS)
    model = tensor_parallel(official, mesh, batch_axis_name=batch_axis)

    def sample(model, params):
        sampler = text.Sampler(
            model=model,
            params=params,
            tokenizer=cast(Any, Numbers()),
            cache_length=16,
            max_out_length=4,
            pad_length=4,
        )
        return sampler.sample(["7 8 9", "10 11"], sampling=text.RandomSampling(), rng=0)

    host = expected()[0]
    with context(mesh, mode):
        params = jax.device_put(host, param_shardings(model))
        found = sample(model, params)
    assert found == sample(official, host)
