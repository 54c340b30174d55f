"""The models of gemma_sizes.py out of google-deepmind/gemma, and how they are run."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import gemma_sizes as sizes
from helpers.runners import make_mesh

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from what the package imports
    pytest.importorskip("gemma", reason="needs google-deepmind/gemma: pip install '.[gemma]'")
    # Tests import these from here, behind the skip.
    from gemma import gm, peft
    from gemma.gm import ckpts, text
    from gemma.gm.nn import _config as gemma3_config
    from gemma.gm.nn import _modules as gemma3_modules
    from gemma.gm.nn import _transformer as gemma3
    from gemma.gm.nn.gemma3n import _gemma3n as gemma3n
    from gemma.gm.nn.gemma4 import _config as gemma4_config
    from gemma.gm.nn.gemma4 import _modules as gemma4_modules
    from gemma.gm.nn.gemma4 import _moe as gemma4_moe
    from gemma.gm.nn.gemma4 import _transformer as gemma4
    from gemma.gm.nn.gemma4.vision import _encoder as gemma4_vision
    from gemma.gm.nn.vision import _vision as gemma3_vision
    from gemma.gm.nn.vision import _vision_utils as gemma3_vision_utils
    from kauldron import kd

    from jax_gemma_arf.integrations.gemma import param_shardings, tensor_parallel


def config(variant: str, layers: int | None = None):
    """Returns the config of the first `layers` layers; None for all."""
    layers = sizes.LAYERS[variant] if layers is None else layers
    modules = gemma3_modules if variant == "Gemma3" else gemma4_modules
    kinds = modules.AttentionType
    common = {
        "num_embed": sizes.VOCAB,
        "embed_dim": sizes.WIDTH,
        "hidden_dim": sizes.FF,
        "num_heads": sizes.HEADS,
        "head_dim": sizes.HEAD_DIM,
        "num_kv_heads": sizes.KV_HEADS[variant],
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "attention_types": ((kinds.LOCAL_SLIDING, kinds.GLOBAL) * layers)[:layers],
        "sliding_window_size": sizes.WINDOW,
        "local_base_frequency": 10_000,
        "global_base_frequency": 1_000_000,
    }
    if variant == "Gemma3":
        return gemma3_config.TransformerConfig(
            **common, final_logit_softcap=None, use_qk_norm=True, transpose_gating_einsum=True
        )
    common |= {
        "final_logit_softcap": 30.0,
        "global_key_size": sizes.GLOBAL_HEAD_DIM,
        "global_rope_proportion": 0.25,
        "local_rope_proportion": 1.0,
    }
    if variant == "E2B":
        shared = max(0, layers - sizes.UNSHARED_LAYERS)
        return gemma4_config.TransformerConfig(
            **common,
            per_layer_input_dim=sizes.PER_LAYER_WIDTH,
            kv_cache_sharing_config=gemma4_config.KVCacheSharingConfig(shared / layers, True, True),
            override_kv_shared_ffw_hidden=2 * sizes.FF,
        )
    common |= {"num_global_kv_heads": sizes.GLOBAL_KV_HEADS[variant], "k_eq_v_global": True}
    if variant == "26B":
        common |= {
            "enable_moe": True,
            "num_experts": sizes.EXPERTS,
            "expert_dim": sizes.EXPERT_FF,
            "top_k_experts": sizes.TOP_K,
            "moe_dense_hidden_dim": sizes.FF,
        }
    return gemma4_config.TransformerConfig(**common)


def official(variant: str, layers: int | None = None, dtype=jnp.float32, **changes) -> Any:
    """changes: of the config."""
    base: Any = gemma3 if variant == "Gemma3" else gemma4
    changed = dataclasses.replace(config(variant, layers), **changes)
    return base.Transformer(config=changed, dtype=dtype)


@functools.cache
def shapes(variant: str, layers: int | None = None, **changes):
    """The official model's parameters as ShapeDtypeStruct. changes: of the config."""
    model = official(variant, layers, **changes)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def params(variant: str, layers: int | None = None, dtype=jnp.float32, plain_router: bool = True):
    """NumPy. plain_router: the scale of the norm before the experts is 1, see test_router."""

    def make(path, leaf):
        name = "/".join(entry.key for entry in path)
        if leaf.ndim == 3 and name.startswith("embedder/per_layer_"):  # [., layers, .], cut
            full = (leaf.shape[0], sizes.LAYERS[variant], leaf.shape[2])
            return sizes.weight(name, full)[:, : leaf.shape[1]].astype(dtype)
        if variant == "26B" and plain_router and name.endswith("pre_ffw_norm/scale"):
            return np.ones(leaf.shape, dtype)
        return sizes.weight(name, leaf.shape).astype(dtype)

    return jax.tree.map_with_path(make, shapes(variant, layers))


def random_params(model):
    """NumPy parameters for any model, by the names of its own tree."""
    own = jax.eval_shape(model.init, jax.random.key(0), sizes.tokens())["params"]
    return jax.tree.map_with_path(
        lambda path, leaf: sizes.weight(jax.tree_util.keystr(path), leaf.shape), own
    )


def sharded(model, host, ranks: int = 2):
    """Returns the model over the first `ranks` CPUs, and its parameters there."""
    model = tensor_parallel(model, make_mesh((ranks,), ("tp",), jax.devices("cpu")[:ranks]))
    return model, jax.device_put(host, param_shardings(model, host))


def structs(shapes, shardings, dtype=None):
    """Shapes with shardings, for a model that is lowered or a checkpoint that is restored."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=s), shapes, shardings
    )


@functools.cache
def apply(model):
    """model.apply, compiled in a hurry: these models are small, and there are many of them."""
    return jax.jit(
        lambda params, tokens, **inputs: model.apply(
            {"params": params}, tokens, return_hidden_states=True, **inputs
        ),
        compiler_options={"xla_backend_optimization_level": 0},
    )


def prefill(model, params) -> dict[str, np.ndarray]:
    """logits and hidden of all tokens at once."""
    out = apply(model)(params, sizes.tokens())
    return {
        "logits": np.asarray(out.logits, np.float32),
        "hidden": np.asarray(out.hidden_states, np.float32),
    }


def cached_logits(model, params, batch: int = sizes.BATCH) -> np.ndarray:
    """Returns the logits of all tokens: a prefill, then the last DECODED tokens one by one."""
    tokens = sizes.tokens()[:batch]
    dtype = jax.tree.leaves(params)[0].dtype
    length = sizes.TOKENS + 3  # room that the mask leaves out
    cache = model.init_cache(batch_size=batch, dtype=dtype, cache_length=length)
    mask = np.broadcast_to(np.tri(sizes.TOKENS, length) > 0, (batch, sizes.TOKENS, length))
    positions = np.broadcast_to(np.arange(sizes.TOKENS, dtype=np.int32), tokens.shape)
    logits, start = [], 0
    for stop in range(sizes.TOKENS - sizes.DECODED, sizes.TOKENS + 1):
        now = slice(start, stop)
        out = apply(model)(
            params,
            tokens[:, now],
            cache=cache,
            positions=positions[:, now],
            attention_mask=mask[:, now],
        )
        logits.append(np.asarray(out.logits, np.float32))
        cache, start = out.cache, stop
    return np.concatenate(logits, 1)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
