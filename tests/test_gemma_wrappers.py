"""The wrappers of gm.nn around tensor parallel models: LoRA, Int8 weights, quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from helpers import gemma_models
from helpers import gemma_sizes as sizes
from helpers.gemma_models import gm, off, peft, sharded
from helpers.runners import make_mesh
from jax_gemma_arf.integrations.gemma import param_shardings, tensor_parallel

TOLERANCE = 2e-5  # as in test_gemma_parity.py


def lora(model):
    return gm.nn.LoRA(model=model, rank=4, dtype=np.dtype(np.float32))


def int8(model):
    return gm.nn.IntWrapper(model=model, dtype=np.dtype(np.int8))


def official(**changes):
    """One layer of Gemma 3, with KV heads that two ranks split and four ranks share."""
    return gemma_models.official("Gemma3", 1, **({"num_kv_heads": 2} | changes))


def make_params(model):
    """Returns NumPy parameters. Adapters are not the zeros of init, which would hide them."""

    def make(path, leaf):
        weight = sizes.weight("/".join(entry.key for entry in path), leaf.shape)
        if path[-1].key == "kernel":
            return (300 * weight).astype(np.int8)
        return 100 + 20 * weight if "_IntEinsum" in path[-2].key else weight

    jax.clear_caches()  # Flax's jit takes a model for the same in whatever wrapper it is called
    shapes = jax.eval_shape(model.init, jax.random.key(0), sizes.tokens())["params"]
    return jax.tree.map_with_path(make, shapes)


@pytest.mark.parametrize(
    ("wrap", "ranks", "changes"),
    [
        (lora, 1, {}),
        (lora, 2, {}),
        (lora, 4, {}),
        (lora, 2, sizes.GEMMA2),
        (int8, 4, {}),
        (int8, 2, sizes.GEMMA2),
    ],
)
def test_wrapped(wrap, ranks, changes):
    """A prefill and decode steps equal a prefill of the wrapped official model."""
    wrapped = wrap(official(**changes))
    host = make_params(wrapped)
    expected = gemma_models.prefill(wrapped, host)["logits"]
    model, params = sharded(wrapped, host, ranks)
    assert off(gemma_models.cached_logits(model, params), expected) < TOLERANCE


def test_gradients_of_adapters():
    """Fine-tuning: the gradient with respect to LoRA's parameters alone."""
    tokens = sizes.tokens()

    @jax.jit(static_argnums=2)
    @jax.grad
    def gradients(adapters, others, model):
        params = peft.merge_params(others, adapters)
        logits = jax.nn.log_softmax(model.apply({"params": params}, tokens).logits)
        return -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], 2).mean()

    wrapped = lora(official())
    host = make_params(wrapped)
    expected = gradients(*peft.split_params(host)[::-1], wrapped)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    for ranks in (2, 4):
        model, params = sharded(wrapped, host, ranks)
        found = gradients(*peft.split_params(params)[::-1], model)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), found, expected
        )


def test_order_of_wrapping():
    """The two orders make the same model, whose adapters lie as the weights that they adapt."""
    mesh = make_mesh((2,), ("tp",), jax.devices("cpu")[:2])
    model = tensor_parallel(lora(official()), mesh)
    assert model == lora(tensor_parallel(official(), mesh))
    layer = jax.tree.map(lambda s: s.spec, param_shardings(model))["layer_0"]
    attn, mlp, tp = layer["attn"], layer["mlp"], ("tp",)
    assert attn["q_einsum"]["_LoRAEinsum_0"]["lora"] == {"a": P(), "b": P(None, tp)}
    assert attn["kv_einsum"]["_LoRAEinsum_0"]["lora"] == {"a": P(), "b": P(None, None, tp)}
    assert attn["attn_vec_einsum"]["_LoRAEinsum_0"]["lora"] == {"a": P(tp), "b": P()}
    assert mlp["_LoRAEinsum_gating_einsum"]["lora"] == {"a": P(), "b": P(None, None, tp)}
    assert mlp["_LoRAEinsum_linear"]["lora"] == {"a": P(tp), "b": P()}


def test_other_replacements():
    """Wrong numbers are refused, by name: of wrappers that are not known, and of two at once."""
    model = tensor_parallel(official(), make_mesh((2,), ("tp",), jax.devices("cpu")[:2]))
    with (
        peft.ModuleInterceptor(lambda module: module),
        pytest.raises(TypeError, match=r"one wrapper .*gm.nn.LoRA .*got \S*<lambda>"),
    ):
        jax.eval_shape(model.init, jax.random.key(0), sizes.tokens())
    with pytest.raises(TypeError, match=r"got gm\.nn\.\w+, gm\.nn\.\w+;"):
        jax.eval_shape(lora(int8(model)).init, jax.random.key(0), sizes.tokens())
    with pytest.raises(TypeError, match="official Gemma 2, 3 or 4 Transformer, in one wrapper"):
        tensor_parallel(lora(int8(official())), model.mesh)


def test_simulated_quantization():
    """The wrapper is refused by name; on the parameters, as Sharp bits says, it is exact."""
    method = peft.QuantizationMethod.INT4
    wrapped = gm.nn.QuantizationAwareWrapper(model=official(), method=method)
    host = make_params(wrapped)
    expected = gemma_models.prefill(wrapped, host)["logits"]
    model, params = sharded(official(), host)
    aware = gm.nn.QuantizationAwareWrapper(model=model, method=method)
    with pytest.raises(TypeError, match=r"one wrapper .*got \S*_by_simulated_quantization;"):
        aware.apply({"params": params}, sizes.tokens())

    def quantize(path, w):
        in_block = path[0].key.startswith("layer_")
        is_weight = path[-1].key in ("w", "gating_einsum", "linear")
        return peft.simulate_quantize(w, method) if in_block and is_weight else w

    @jax.jit
    def logits(params):
        params = jax.tree.map_with_path(quantize, params)
        return model.apply({"params": params}, sizes.tokens()).logits

    assert off(np.asarray(logits(params)), expected) < TOLERANCE


def test_placement_in_a_wrapper():
    """Parameters that lie otherwise are refused, though apply is the wrapper's."""
    model = tensor_parallel(lora(official()), make_mesh((2,), ("tp",), jax.devices("cpu")[:2]))
    params = jax.device_put(make_params(model), jax.devices("cpu")[0])
    with pytest.raises(ValueError, match=r"parameter \S+ must lie as .*param_shardings"):
        model.apply({"params": params}, sizes.tokens())
