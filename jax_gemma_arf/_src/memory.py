"""Device memory of the kernel: how much calls need, and how to allocate it at start-up."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_gemma_arf._src import extension
from jax_gemma_arf._src.decision import choose_algorithm, client_of, device_kind, fusion_support
from jax_gemma_arf._src.fused_ops import fused_all_reduce_norm, fused_moe_tail
from jax_gemma_arf._src.mesh import AnyMesh, AxisName, axis_names, group_size
from jax_gemma_arf._src.operands import AXIS_SIZES, TWO_BRANCHES, Operation, branches_of


def workspace_bytes(
    max_tokens: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    *,
    mesh: AnyMesh,
    axis_name: AxisName,
    op: Operation = "fused_post_ff",
) -> int:
    """Returns the device memory, in bytes on each GPU, of all calls of up to max_tokens tokens.

    A call takes a workspace by the size of its partial sums, rounded up to a power of two of at
    least 64 KiB. All operations of one replica group share the workspaces, which lie outside of
    JAX's own pool and are never freed.

    Args:
      max_tokens: largest number of tokens of a call on one rank, with all leading axes.
      width: D.
      dtype: the dtype of the partial sums; the residual's is the same.
      mesh: the mesh. The limit of one-shot depends on its device kind; an AbstractMesh, which has
        none, is taken to consist of H100s.
      axis_name: the mesh axis (or axes) of tensor parallelism.
      op: of the operations that the model calls, the one that reduces the most partial sums.
        "fused_moe_tail" includes the workspaces of operations with one partial sum.

    Raises:
      ValueError: if max_tokens or width is not positive, if op is no operation, if axis_name does
        not name axes of the mesh or does not have 2, 4 or 8 ranks, or if the partial sums are too
        large.
      NotImplementedError: if the extension was not built.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((2,), ("tp",))
      >>> jga.workspace_bytes(8, 5376, jnp.bfloat16, mesh=mesh, axis_name="tp")  # 64 and 128 KiB
      787968
    """
    if missing := extension.why_missing():
        raise NotImplementedError(f"workspace_bytes: {missing}")
    ranks = _ranks(max_tokens, width, dtype, mesh, axis_name, op)
    return sum(size.bytes for size in _sizes(max_tokens, width, dtype, mesh, op, ranks))


def reserve(
    max_tokens: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    *,
    mesh: jax.sharding.Mesh,
    axis_name: AxisName,
    op: Operation = "fused_post_ff",
) -> int:
    """Allocates now what calls of up to max_tokens tokens need, instead of at their first runs.

    The allocation of a workspace is collective: all ranks of a replica group wait for it. Call this
    when a server starts, in every process, before memory gets scarce and before traffic arrives.

    Args:
      max_tokens, width, dtype, mesh, axis_name, op: as in :func:`workspace_bytes`.

    Returns:
      The bytes on each GPU that such calls use, :func:`workspace_bytes`; 0 where calls run as psum,
      which needs no workspace.

    Raises:
      ValueError: as workspace_bytes.
    """
    ranks = _ranks(max_tokens, width, dtype, mesh, axis_name, op)
    if not fusion_support((max_tokens, width), dtype, mesh=mesh, axis_name=axis_name, op=op):
        return 0
    sizes = _sizes(max_tokens, width, dtype, mesh, op, ranks)

    def calls() -> tuple[Any, ...]:
        scale = jnp.ones(width, dtype)
        options: dict[str, Any] = {"axis_name": axis_name, "implementation": "cuda"}
        outputs = []
        for size in sizes:
            x = jnp.ones((size.tokens, width), dtype)
            if size.branches == 1:
                outputs.append(fused_all_reduce_norm(x, scale, **options))
            else:
                scales: Any = dict.fromkeys(TWO_BRANCHES.scales, scale)
                outputs.append(fused_moe_tail(x, x, x, **scales, **options))
        return tuple(out[0, 0] for out in outputs)

    # Partial sums that are equal on all ranks, which check_vma would refuse.
    run = jax.shard_map(calls, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False)
    jax.block_until_ready(jax.jit(run)())
    return sum(size.bytes for size in sizes)


def _ranks(max_tokens, width, dtype, mesh, axis_name, op) -> int:
    """Checks the arguments. Returns the number of ranks."""
    for name, number in (("max_tokens", max_tokens), ("width", width)):
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}")
    ranks = group_size(mesh, axis_names(axis_name, mesh))
    if ranks not in AXIS_SIZES:
        raise ValueError(f"axis_name must name axes with 2, 4 or 8 ranks, got {ranks}")
    # With the limits of a call, and its words.
    abstract = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names)
    support = fusion_support((max_tokens, width), dtype, mesh=abstract, axis_name=axis_name, op=op)
    if not support.ok and not support.deliberate and extension.load() is not None:
        raise ValueError(f"no call has these sizes: {'; '.join(support.reasons)}")
    return ranks


class _Size(NamedTuple):
    """One workspace: its bytes, and the smallest call that takes it."""

    bytes: int
    tokens: int
    branches: int


def _sizes(max_tokens, width, dtype, mesh, op, ranks) -> list[_Size]:
    """Returns the workspaces that calls can take; the extension must be built.

    A model that calls fused_moe_tail calls operations with one branch, too.
    """
    built: Any = extension.load()
    row = width * jnp.dtype(dtype).itemsize
    sizes: dict[tuple[str, int], _Size] = {}
    kind = device_kind(client_of(mesh))
    branches = range(1, branches_of(op) + 1)
    for count, tokens in itertools.product(branches, range(1, max_tokens + 1)):
        algorithm = choose_algorithm(ranks, tokens * count * row, kind=kind)
        one_shot = algorithm == "one_shot"
        # Two-shot has whole groups of rows, one for each rank.
        rows = tokens if one_shot else math.ceil(tokens / ranks) * ranks
        size = built.workspace_bytes(one_shot, ranks, rows * count * row)
        sizes.setdefault((algorithm, size), _Size(size, tokens, count))
    return list(sizes.values())
