"""Small Gemma models: their sizes, inputs and weights, for the official package and transformers.

NumPy alone, since each of the two is tested where the other is not installed.
"""

import zlib

import numpy as np

VARIANTS = ("31B", "E2B", "26B", "Gemma3")
LAYERS = {"31B": 2, "E2B": 4, "26B": 2, "Gemma3": 2}
VOCAB, WIDTH, FF, HEADS, HEAD_DIM, GLOBAL_HEAD_DIM, WINDOW = 64, 256, 128, 4, 16, 32, 4
EXPERTS, TOP_K, EXPERT_FF, PER_LAYER_WIDTH = 8, 2, 32, 16
KV_HEADS = {"31B": 2, "E2B": 1, "26B": 2, "Gemma3": 1}
GLOBAL_KV_HEADS = {"31B": 1, "26B": 1}
# Changes of Gemma 3's config: gates of [2, D, H], one projection for query, key and value, capped
# attention.
GEMMA2 = {
    "transpose_gating_einsum": False,
    "num_kv_heads": HEADS,
    "use_qk_norm": False,
    "attn_logits_soft_cap": 50.0,
}
# The first two of E2B's layers lend their keys and values to the others.
UNSHARED_LAYERS = 2

BATCH, TOKENS, DECODED = 2, 9, 3

# Changes of 31B's config: blocks as wide as the official ones.
WIDE = {
    "embed_dim": 5376,
    "hidden_dim": 21504,
    "num_heads": 32,
    "head_dim": 256,
    "num_kv_heads": 16,
    "global_key_size": 512,
    "num_global_kv_heads": 4,
}


def tokens() -> np.ndarray:
    """[BATCH, TOKENS]; the last DECODED of them are fed one by one in the cached runs."""
    return np.random.default_rng(0).integers(1, VOCAB, (BATCH, TOKENS)).astype(np.int32)


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 parameter at a path of the official tree, such as layer_0/attn/q_einsum/w.

    No two layers, norms or experts are alike, and norm scales are far from the 1 that would hide a
    norm in the wrong place.
    """
    noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)
    if path.endswith("skip_scale"):
        noise = 0.75 + 0.1 * noise
    elif path.endswith("scale"):  # 1 + w in Gemma 3, w in Gemma 4
        noise = 0.5 + 0.25 * np.abs(noise)
    elif path.endswith("embedding"):
        noise = 0.25 * noise
    else:
        noise = 0.1 * noise
    return noise.astype(np.float32)
