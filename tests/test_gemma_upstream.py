"""The official code that the integration restates, so that no change of it passes unnoticed."""

import ast
import hashlib
import importlib.metadata
import inspect
import textwrap
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from helpers import gemma_models  # skips the module where there is no gemma package
from helpers.gemma_models import gemma3, gemma3_modules, gemma4, gemma4_modules, gemma4_moe, off
from jax_gemma_arf.integrations import gemma as integration

VERSION = importlib.metadata.version("gemma")

# Digests of the code in gemma 4.0.1 and, where it differs, 4.1.0.
RESTATED = {
    "_run_blocks": {
        gemma3.Transformer._apply_attention: ["9ed41fef"],
        gemma3_modules.Block.__call__: ["ac279f20"],
        gemma4.Transformer._apply_attention: ["ed575122", "4bcb2909"],
        gemma4_modules.Block.__call__: ["820dc1c6", "1ef27780"],
    },
    "_dense_half": {gemma4_modules.Block._forward_dense: ["fc06518d"]},
    "_moe_half": {
        gemma4_modules.Block._forward_moe: ["2e4f86c3", "66b9706a"],
        gemma4_moe.MoERagged.__call__: ["f214e851", "5de011c7"],
    },
    "run_experts": {gemma4_moe.MoERagged._run_ffw_and_routing: ["09e5ac1d"]},
    "_vocabulary_parallel": {
        gemma3_modules.Embedder.encode: ["32e9a409"],
        gemma3_modules.Embedder.decode: ["dfc0ce6c"],
        gemma4_modules.Embedder.encode: ["32e9a409"],
        gemma4_modules.Embedder.decode: ["dfc0ce6c"],
    },
    "_per_layer_input": {gemma4_modules.Embedder.encode_per_layer_input: ["b3f9609c"]},
    "decode_attention": {
        gemma3_modules.Attention.__call__: ["ce183c6d"],
        gemma4_modules.Attention.__call__: ["c7217019", "c19791ab"],
    },
}


def digest(function) -> str:
    """Returns a digest of a function's code, without comments, docstring and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8]


@pytest.mark.parametrize("name", RESTATED)
def test_restated_code(name):
    assert callable(getattr(integration, name))
    for function, digests in RESTATED[name].items():
        assert digest(function) in digests, (
            f"{function.__module__}.{function.__qualname__} of gemma {VERSION} is not "
            f"the code that {name} of the integration restates: compare the two, run "
            "test_gemma_parity.py, then add the digest here and the version to TESTED_VERSIONS"
        )


def test_untested_version():
    with pytest.warns(UserWarning, match=r"gemma 9\.9\.9 .*\(4\.0\.1, .*compare the logits"):
        integration._warn_if_untested("9.9.9")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration._warn_if_untested(VERSION)


def test_router_of_the_stream(monkeypatch):
    """gemma 4.1.0 routes by the residual stream where 4.0.1 routes by its norm."""

    class MoERagged(gemma4_moe.MoERagged):
        def __call__(self, x, unnormalized_x=None):
            router_input = self.router_norm(x if unnormalized_x is None else unnormalized_x)
            router_input *= jax.lax.rsqrt(np.float32(self.features)) * self.router_scale
            weights, choices = self._router(self.router_logits("gsd,de->gse", router_input))
            return self._run_ffw_and_routing(x, choices, weights)

    class Block(gemma4_modules.Block):
        def _forward_moe(self: Any, attn_output):
            dense = self.post_ffw2_norm(self.mlp2(self.pre_ffw2_norm(attn_output)))
            experts = self.mlp(self.pre_ffw_norm(attn_output), unnormalized_x=attn_output)
            return self.post_ffw_norm(dense + self.post_ffw1_norm(experts))

    official = gemma_models.official("26B", 1)
    host = gemma_models.params("26B", 1, plain_router=False)

    def logits(model, params):
        jax.clear_caches()  # of Flax's jit, which does not know that the official code changed
        gemma_models.apply.cache_clear()
        return gemma_models.prefill(model, params)["logits"]

    by_norm = logits(official, host)
    monkeypatch.setattr(gemma4_moe, "MoERagged", MoERagged)
    monkeypatch.setattr(gemma4_modules, "Block", Block)
    expected = logits(official, host)
    assert off(logits(*gemma_models.sharded(official, host)), expected) < 2e-5
    if "unnormalized_x" not in inspect.signature(gemma4_moe.MoE.__call__).parameters:
        assert off(by_norm, expected) > 1e-3
