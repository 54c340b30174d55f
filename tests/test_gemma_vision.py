"""Vision encoders, which the compiler partitions by the shardings of their parameters."""

import jax
import numpy as np

from helpers import gemma_models
from helpers import gemma_sizes as sizes
from helpers.gemma_models import gemma3_vision, gemma3_vision_utils, gemma4_vision, off
from jax_gemma_arf import audit

IMAGE_TOKEN, VOCAB = 255_999, 262_148
SIGLIP = gemma3_vision.SigLiPFromPatches(
    siglip_encoder=gemma3_vision_utils.ViTModel(
        patch_size=(14, 14), width=32, depth=2, mlp_dim=48, num_heads=4
    ),
    siglip_exit=gemma3_vision.VisionExit(output_length=4),
    num_mm_tokens_per_image_prepool=16,
    num_mm_tokens_per_image=4,
    image_height=56,
    image_width=56,
)
GEMMA4_ENCODER = gemma4_vision.VisionEncoder(
    d_model=32,
    num_layers=2,
    num_heads=4,
    ffw_hidden=48,
    patch_size=4,
    output_length=4,
    pos_emb_shape_yx=(8, 2),
)


def matmul_fraction(params) -> float:
    """Returns how much of the matmuls' weights of the layers lies on one device."""
    weights = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key in ("kernel", "w") and "transformer" in jax.tree_util.keystr(path).lower()
    ]
    local = sum(w.addressable_shards[0].data.nbytes for w in weights)
    return local / sum(w.nbytes for w in weights)


def test_siglip():
    """A Gemma 3 with images equals the official one; its encoder is split, and not gathered."""
    official = gemma_models.official("Gemma3", 1, vision_encoder=SIGLIP, num_embed=VOCAB)
    host = gemma_models.random_params(official)
    tokens = sizes.tokens().copy()
    tokens[:, 2] = IMAGE_TOKEN
    images = np.random.default_rng(0).integers(0, 255, (sizes.BATCH, 56, 56, 3)).astype(np.uint8)

    @jax.jit(static_argnums=0)
    def hidden(model, params, images):
        return model.apply(
            {"params": params}, tokens, images=images, return_hidden_states=True
        ).hidden_states

    expected = hidden(official, host, images)
    assert off(hidden(official, host, 0 * images), expected) > 0.1
    for ranks in (2, 4):
        model, params = gemma_models.sharded(official, host, ranks)
        assert off(hidden(model, params, images), expected) < 2e-5
        assert matmul_fraction(params["vision_encoder"]) == 1 / ranks
    collectives = audit(hidden.lower(model, params, images).compile())
    lookup = 1
    assert [found.kind for found in collectives].count("all-gather") == lookup


def test_gemma4_encoder():
    official = gemma_models.official("31B", 1, vision_encoder=GEMMA4_ENCODER)
    host = gemma_models.random_params(official)
    rng = np.random.default_rng(0)
    length = GEMMA4_ENCODER.max_patches
    patches = rng.random((2, length, 3 * 4**2)).astype(np.float32)
    positions = rng.integers(0, 8, (2, length, 2)).astype(np.int32)

    @jax.jit
    def encode(params):
        return GEMMA4_ENCODER.apply({"params": params}, patches, positions)[0][0]

    expected = encode(host["vision_encoder"])
    for ranks in (2, 4):
        params = gemma_models.sharded(official, host, ranks)[1]["vision_encoder"]
        assert off(encode(params), expected) < 2e-5
        assert matmul_fraction(params) == 1 / ranks
    compiled = encode.lower(params).compile().as_text()
    assert compiled is not None
    assert "all-gather" not in compiled
