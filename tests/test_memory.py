"""workspace_bytes and reserve: sizes without a GPU, allocation on a mesh of GPUs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.runners import check_docstring_example, make_mesh
from jax_gemma_arf._src import decision
from jax_gemma_arf._src.operands import BRANCHES, TWO_BRANCHES

TP2 = jax.sharding.AbstractMesh((2,), ("tp",))


def bytes_of(max_tokens, width=5376, dtype=jnp.bfloat16, mesh=TP2, **options):
    return jga.workspace_bytes(max_tokens, width, dtype, mesh=mesh, axis_name="tp", **options)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("op", ["fused_post_ff", "fused_moe_tail"])
def test_every_size_has_a_workspace(built, ranks, op):
    """Adds up over the sizes that single calls of 1 to 700 tokens take."""
    width = 2816
    sizes = set()
    for row in (width * 2, BRANCHES[op] * width * 2):
        for tokens in range(1, 701):
            one_shot = decision.choose_algorithm(ranks, tokens * row) == "one_shot"
            rows = tokens if one_shot else -(-tokens // ranks) * ranks
            capacity = 2 ** max(16, math.ceil(math.log2(rows * row)))
            sizes.add((one_shot, ranks, capacity))
    mesh = jax.sharding.AbstractMesh((ranks,), ("tp",))
    total = sum(built.workspace_bytes(*size) for size in sizes)
    assert bytes_of(700, width, mesh=mesh, op=op) == total


def test_example(built):
    check_docstring_example(jga.workspace_bytes, jga=jga)


def test_bad_arguments(built):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": 0}, "max_tokens must be positive, got 0"),
        ({"max_tokens": 1, "width": -64}, "width must be positive"),
        ({"max_tokens": 1, "width": 100}, "no call has these sizes: D must be a multiple of 64"),
        ({"max_tokens": 10**6}, "no call has these sizes: .* above the workspace cap"),
        ({"max_tokens": 1, "op": "moe_tail"}, "op must be one of fused_post_ff, .*got 'moe_tail'"),
        ({"max_tokens": 1, "dtype": jnp.int8}, "no call has these sizes: x must be bfloat16"),
        ({"max_tokens": 1, "mesh": jax.sharding.AbstractMesh((3,), ("tp",))}, "2, 4 or 8 ranks"),
        ({"max_tokens": 1, "mesh": jax.sharding.AbstractMesh((2,), ("x",))}, "axis_name must name"),
    ]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words):
            bytes_of(**wrong)


def test_nothing_to_reserve(mesh):
    """On CPUs calls are psum."""
    assert jga.reserve(64, 640, jnp.bfloat16, mesh=mesh, axis_name="tp") == 0


@pytest.mark.parametrize("op", ["fused_all_reduce_norm", "fused_moe_tail"])
def test_multi_gpu_reserve(built, require_gpus, op):
    """Calls of any size up to the reserved one then allocate nothing."""
    mesh = make_mesh((2,), ("tp",), require_gpus(2))
    limits: dict[str, Any] = {"mesh": mesh, "axis_name": "tp", "op": op}
    before = sum(part.bytes for part in jga.workspaces() if part.nranks == 2)
    reserved = jga.reserve(900, 5376, jnp.bfloat16, **limits)
    assert reserved == jga.workspace_bytes(900, 5376, jnp.bfloat16, **limits)
    parts = jga.workspaces()
    assert sum(part.bytes for part in parts if part.nranks == 2) - before <= 2 * reserved

    def call(x):
        scale = jnp.ones(5376, x.dtype)
        options: dict[str, Any] = {"axis_name": "tp", "implementation": "cuda"}
        if op == "fused_all_reduce_norm":
            return jga.fused_all_reduce_norm(x, scale, **options)
        scales: dict[str, Any] = dict.fromkeys(TWO_BRANCHES.scales, scale)
        return jga.fused_moe_tail(x, x, x, **scales, **options)

    run = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(P(),), out_specs=P(), check_vma=False))
    for tokens in (1, 6, 7, 100, 195, 196, 899, 900):
        out = np.asarray(run(jnp.ones((tokens, 5376), jnp.bfloat16)))
        assert np.isfinite(out.astype(np.float32)).all()
    assert [part.base for part in jga.workspaces()] == [part.base for part in parts]
