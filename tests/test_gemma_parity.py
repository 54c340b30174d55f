"""Tensor parallel models against the official unsharded ones and against transformers.

Float32 throughout: what is left are float32 roundings in another order. TOLERANCE is relative to
the largest value; the fused order of norm and add gives 1e-6, the mistaken one above 1e-1.
"""

import functools
import pathlib

import gemma_models
import gemma_sizes as sizes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma_models import off
from runners import make_mesh

from jax_gemma_arf.integrations import gemma
from jax_gemma_arf.reference import rmsnorm

TOLERANCE = 2e-5
RANKS = (1, 2, 4)
HF = pathlib.Path(__file__).parent / "data" / "hf_vectors.npz"

all_variants = pytest.mark.parametrize("variant", sizes.VARIANTS)
all_ranks = pytest.mark.parametrize("ranks", RANKS)


@functools.cache
def expected(variant: str, layers: int | None = None, plain_router: bool = False):
    """The official model on one device."""
    model = gemma_models.official(variant, layers)
    params = gemma_models.params(variant, layers, plain_router=plain_router)
    return gemma_models.run(model, params)


def sharded(variant: str, ranks: int, layers: int | None = None, **options):
    """A model over the first so many CPUs, and a function that places parameters for it."""
    mesh = make_mesh((ranks,), ("tp",), jax.devices("cpu")[:ranks])
    model = gemma.tensor_parallel(gemma_models.official(variant, layers, **options), mesh)
    return model, lambda params: jax.device_put(params, gemma.param_shardings(model))


@functools.cache
def found(variant: str, ranks: int, layers: int | None = None, plain_router: bool = False):
    model, place = sharded(variant, ranks, layers)
    params = gemma_models.params(variant, layers, plain_router=plain_router)
    return gemma_models.run(model, place(params))


@functools.cache
def transformers():
    return np.load(HF)


@all_ranks
@all_variants
def test_matches_the_official_model(variant, ranks):
    for name, array in expected(variant).items():
        assert off(found(variant, ranks)[name], array) < TOLERANCE, name


@all_ranks
@all_variants
def test_cached_decode_matches_prefill(variant, ranks):
    assert off(found(variant, ranks)["cached"], found(variant, ranks)["logits"]) < TOLERANCE


@all_ranks
@all_variants
def test_matches_transformers(variant, ranks):
    """The MoE router of transformers normalises the residual stream; the official one normalises the
    experts' input, which is that stream normed and scaled. They are alike where the scale is 1."""
    ours = found(variant, ranks, plain_router=variant == "26B")
    logits, decoded = (transformers()[f"{variant}_{name}"] for name in ("logits", "decoded"))
    assert off(ours["logits"], logits) < TOLERANCE
    assert off(ours["cached"][:, -sizes.DECODED :], decoded) < TOLERANCE


@all_ranks
@pytest.mark.parametrize(
    ("variant", "layers"),
    [(variant, n) for variant in sizes.VARIANTS for n in range(1, sizes.LAYERS[variant] + 1)],
)
def test_each_block(variant, layers, ranks):
    """The output of each block, after the final norm, from models of that many layers."""
    hidden = found(variant, ranks, layers, variant == "26B")["hidden"]
    assert off(hidden, expected(variant, layers, variant == "26B")["hidden"]) < TOLERANCE
    assert off(hidden, transformers()[f"{variant}_blocks"][layers - 1]) < TOLERANCE


def test_router_reads_the_experts_input():
    """The package's own reading, which this one keeps: not transformers' as soon as the scale of the
    norm before the experts is not 1."""
    logits = transformers()["26B_logits"]
    assert off(expected("26B", plain_router=True)["logits"], logits) < TOLERANCE
    model = gemma_models.official("26B")
    params = gemma_models.params("26B", plain_router=True)
    for i in range(sizes.LAYERS["26B"]):
        layer = params[f"layer_{i}"]
        scale = np.linspace(0.5, 2, sizes.HIDDEN, dtype=np.float32)
        layer["pre_ffw_norm"]["scale"] = scale
        # What would make up for it in everything but the router.
        layer["mlp"]["gating_einsum"]["w"] = layer["mlp"]["gating_einsum"]["w"] / scale
    assert off(gemma_models.run(model, params)["logits"], logits) > 100 * TOLERANCE


@all_variants
def test_add_before_norm_is_noticed(variant, monkeypatch):
    """The mistaken order, as in Llama-style fusions, is not within the tolerance."""

    def wrong(x, residual, norm_scale, layer_scalar=None, *, axis_name, scale_offset, **_):
        h = rmsnorm(jax.lax.psum(x, axis_name) + residual, norm_scale, scale_offset=scale_offset)
        return h if layer_scalar is None else h * layer_scalar

    def wrong_sandwich(*operands, next_norm_scale, **options):
        h = wrong(*operands, **options)
        norm = functools.partial(rmsnorm, h, scale_offset=options["scale_offset"])
        return h, jax.tree.map(lambda scale: norm(scale), next_norm_scale)

    monkeypatch.setattr(gemma, "fused_post_ff", wrong)
    monkeypatch.setattr(gemma, "fused_sandwich", wrong_sandwich)
    jax.clear_caches()
    model, place = sharded(variant, 2)
    logits = model.apply({"params": place(gemma_models.params(variant))}, sizes.tokens()).logits
    jax.clear_caches()
    assert off(np.asarray(logits), expected(variant)["logits"]) > 1e-1


@pytest.mark.parametrize("variant", ["31B", "Gemma3"])
def test_bfloat16(variant):
    """The package's own norm rounds to bfloat16 within; ours does not. So ours must be about as near
    to the float32 model as the official one."""
    params = gemma_models.params(variant, dtype=jnp.bfloat16)
    model, place = sharded(variant, 2, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda a: a.astype(np.float32), params)
    exact = gemma_models.run(gemma_models.official(variant), rounded)
    theirs = gemma_models.run(gemma_models.official(variant, dtype=jnp.bfloat16), params)
    ours = gemma_models.run(model, place(params))
    for name, array in exact.items():
        assert off(ours[name], array) < 1.5 * off(theirs[name], array) < 0.1, name


def test_gradients(variant="31B"):
    """Through the shard_map and the fused operations, to every parameter."""
    params = gemma_models.params(variant)
    tokens = sizes.tokens()

    def loss(params, model):
        logits = jax.nn.log_softmax(model.apply({"params": params}, tokens).logits)
        return -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], 2).mean()

    want = jax.jit(jax.grad(loss), static_argnums=1)(params, gemma_models.official(variant))
    model, place = sharded(variant, 2)
    grads = jax.jit(jax.grad(loss), static_argnums=1)(place(params), model)
    largest = max(np.abs(a).max() for a in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), grads, want)
