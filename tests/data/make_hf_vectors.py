"""Records what Hugging Face transformers computes for the small models of helpers/gemma_sizes.py.

Run it where torch and transformers 5.17.0 are installed; the tests read hf_vectors.npz alone:

    pip install torch transformers==5.17.0
    python tests/data/make_hf_vectors.py

For each variant: logits of all tokens at once, logits of the last ones decoded with a cache, and
every block's output after the final norm.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma4ForCausalLM, Gemma4TextConfig

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from helpers import gemma_sizes as sizes  # noqa: E402


def build(variant: str) -> torch.nn.Module:
    """The model, its weights not set yet."""
    common = {
        "vocab_size": sizes.VOCAB,
        "hidden_size": sizes.WIDTH,
        "intermediate_size": sizes.FF,
        "num_hidden_layers": sizes.LAYERS[variant],
        "num_attention_heads": sizes.HEADS,
        "num_key_value_heads": sizes.KV_HEADS[variant],
        "head_dim": sizes.HEAD_DIM,
        "sliding_window": sizes.WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * (sizes.LAYERS[variant] // 2),
        "attn_implementation": "eager",
    }
    if variant == "Gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**common, query_pre_attn_scalar=sizes.HEAD_DIM))
    common |= {
        "global_head_dim": sizes.GLOBAL_HEAD_DIM,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
    }
    if variant == "E2B":
        common |= {
            "hidden_size_per_layer_input": sizes.PER_LAYER_WIDTH,
            "vocab_size_per_layer_input": sizes.VOCAB,
            "num_kv_shared_layers": sizes.LAYERS[variant] - sizes.UNSHARED_LAYERS,
            "use_double_wide_mlp": True,
        }
    else:
        common |= {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": sizes.GLOBAL_KV_HEADS[variant],
        }
    if variant == "26B":
        common |= {
            "enable_moe_block": True,
            "num_experts": sizes.EXPERTS,
            "top_k_experts": sizes.TOP_K,
            "moe_intermediate_size": sizes.EXPERT_FF,
        }
    return Gemma4ForCausalLM(Gemma4TextConfig(**common))


def official(variant: str, name: str, shape: tuple[int, ...]) -> np.ndarray:  # noqa: PLR0911, PLR0912
    """Returns the parameter that transformers calls name, out of the official tree."""
    if name == "embed_tokens.weight":
        return sizes.weight("embedder/input_embedding", shape)
    if name == "embed_tokens_per_layer.weight":
        split = (sizes.VOCAB, sizes.LAYERS[variant], sizes.PER_LAYER_WIDTH)
        return sizes.weight("embedder/per_layer_embeddings", split).reshape(shape)
    if name == "per_layer_model_projection.weight":
        split = (sizes.WIDTH, sizes.LAYERS[variant], sizes.PER_LAYER_WIDTH)
        w = sizes.weight("embedder/per_layer_model_projection/w", split)
        return w.reshape(sizes.WIDTH, -1).T
    if name == "per_layer_projection_norm.weight":
        return sizes.weight("embedder/per_layer_projection_norm/scale", shape)
    if name == "norm.weight":
        return sizes.weight("final_norm/scale", shape)

    _, number, name = name.split(".", 2)
    at = f"layer_{number}"
    moe = variant == "26B"
    norms = {
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw2_norm" if moe else "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "pre_feedforward_layernorm_2": "pre_ffw_norm",
        "post_feedforward_layernorm_1": "post_ffw2_norm",
        "post_feedforward_layernorm_2": "post_ffw1_norm",
        "post_per_layer_input_norm": "post_per_layer_input_norm",
        "self_attn.q_norm": "attn/_query_norm" if variant == "Gemma3" else "attn/query_norm",
        "self_attn.k_norm": "attn/_key_norm" if variant == "Gemma3" else "attn/key_norm",
    }
    if norm := norms.get(name.removesuffix(".weight")):
        return sizes.weight(f"{at}/{norm}/scale", shape)
    if name == "layer_scalar":
        return sizes.weight(f"{at}/skip_scale", shape)

    # transformers stores [outputs, inputs].
    head_dim = sizes.HEAD_DIM
    if variant != "Gemma3" and int(number) % 2 == 1:
        head_dim = sizes.GLOBAL_HEAD_DIM
    if name == "self_attn.q_proj.weight":
        w = sizes.weight(f"{at}/attn/q_einsum/w", (sizes.HEADS, sizes.WIDTH, head_dim))
        return w.swapaxes(1, 2).reshape(shape)
    if name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        heads = (shape[0] // head_dim, sizes.WIDTH, head_dim)
        if variant in sizes.GLOBAL_KV_HEADS and int(number) % 2 == 1:
            w = sizes.weight(f"{at}/attn/k_einsum/w", heads)
        else:
            w = sizes.weight(f"{at}/attn/kv_einsum/w", (2, *heads))[int("v_proj" in name)]
        return w.swapaxes(1, 2).reshape(shape)
    if name == "self_attn.o_proj.weight":
        w = sizes.weight(f"{at}/attn/attn_vec_einsum/w", (sizes.HEADS, head_dim, sizes.WIDTH))
        return w.reshape(-1, sizes.WIDTH).T
    mlp = f"{at}/mlp2" if moe else f"{at}/mlp"
    if name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        return sizes.weight(f"{mlp}/gating_einsum", (2, *shape))[int("up" in name)]
    if name == "mlp.down_proj.weight":
        return sizes.weight(f"{mlp}/linear", shape[::-1]).T
    if name == "experts.gate_up_proj":
        split = (sizes.EXPERTS, 2, sizes.EXPERT_FF, sizes.WIDTH)
        return sizes.weight(f"{at}/mlp/gating_einsum/w", split).reshape(shape)
    if name == "experts.down_proj":
        split = (sizes.EXPERTS, sizes.EXPERT_FF, sizes.WIDTH)
        return sizes.weight(f"{at}/mlp/linear/w", split).swapaxes(1, 2)
    if name == "router.proj.weight":
        return sizes.weight(f"{at}/mlp/router_logits/w", shape[::-1]).T
    if name == "router.scale":
        return sizes.weight(f"{at}/mlp/router_scale", shape)
    if name == "router.per_expert_scale":
        return sizes.weight(f"{at}/mlp/per_expert_scale", shape)
    if name in ("per_layer_input_gate.weight", "per_layer_projection.weight"):
        return sizes.weight(f"{at}/{name.removesuffix('.weight')}/w", shape[::-1]).T
    raise KeyError(name)


@torch.no_grad()
def record(variant: str) -> dict[str, np.ndarray]:
    """The arrays of one variant."""
    model = build(variant).eval()
    tensors = dict(model.model.named_parameters()) | {
        name: buffer for name, buffer in model.model.named_buffers() if "layer_scalar" in name
    }
    for name, tensor in tensors.items():
        values = official(variant, name, tuple(tensor.shape))
        if variant == "26B" and name.endswith("pre_feedforward_layernorm_2.weight"):
            values = np.ones_like(values)  # see test_gemma_parity.py on the router
        assert values.shape == tuple(tensor.shape), (name, values.shape, tensor.shape)
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    # transformers normalises only the last of its hidden states.
    blocks = []
    hooks = [
        layer.register_forward_hook(lambda *a: blocks.append(model.model.norm(a[-1])))
        for layer in model.model.layers
    ]
    tokens = torch.from_numpy(sizes.tokens().astype(np.int64))
    logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    out = model(tokens[:, : -sizes.DECODED], use_cache=True)
    decoded = []
    for i in range(sizes.TOKENS - sizes.DECODED, sizes.TOKENS):
        out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        decoded.append(out.logits)
    arrays = {"logits": logits, "decoded": torch.cat(decoded, 1), "blocks": torch.stack(blocks)}
    return {f"{variant}_{name}": a.numpy() for name, a in arrays.items()}


if __name__ == "__main__":
    assert transformers.__version__ == "5.17.0", transformers.__version__
    torch.manual_seed(0)
    vectors = {}
    for each in sizes.VARIANTS:
        vectors |= record(each)
    np.savez_compressed(HERE / "hf_vectors.npz", **vectors)
    for key, value in vectors.items():
        print(key, value.shape, np.abs(value).max())
