"""Embedding lookup with the vocabulary split over ranks, inside ``jax.shard_map``.

Megatron-LM's vocabulary parallelism (arXiv:1909.08053, section 3): a rank looks up the rows that it
holds and puts zeros for the others, and one all-reduce of the rows found completes the lookup. The
few rows of a decode step are gathered instead, since then no rank needs its own index.
"""

import math

import jax
import jax.numpy as jnp

from jax_gemma_arf._src.mesh import AxisName

#: Up to this many bytes of rows, of all ranks together, are gathered. Two ranks send as much either
#: way; eight send four times as much as in an all-reduce.
GATHER_MAX_BYTES = 4 << 20


def lookup(table: jax.Array, ids: jax.Array, *, axis_name: AxisName) -> jax.Array:
    """Rows of a table whose first axis is split over axis_name in rank order.

    Args:
      table: [V / N, ...], this rank's rows.
      ids: [...], integers, replicated over axis_name. As in ``table[ids]`` of the whole table,
        negative ids count from the end, and ids that are out of range are clamped to it.
      axis_name: the manual mesh axis (or axes) that splits the table, N ranks.

    Returns:
      [*ids.shape, ...], table.dtype, replicated over axis_name.
    """
    rows, ranks = table.shape[0], jax.lax.axis_size(axis_name)
    vocabulary = rows * ranks
    ids = jnp.clip(jnp.where(ids < 0, ids + vocabulary, ids), 0, vocabulary - 1)
    row_bytes = math.prod(table.shape[1:]) * table.dtype.itemsize
    if ranks * ids.size * row_bytes <= GATHER_MAX_BYTES:
        return _by_gathering(table, ids, axis_name)
    local = ids - jax.lax.axis_index(axis_name) * rows
    held = _like_rows((local >= 0) & (local < rows), table)
    found = table[jnp.clip(local, 0, rows - 1)]
    return jax.lax.psum(jnp.where(held, found, jnp.zeros((), table.dtype)), axis_name)


def _by_gathering(table: jax.Array, ids: jax.Array, axis_name: AxisName) -> jax.Array:
    """Each rank sends the row that it would have if it were the holder; the holder's is taken.

    With a rank's index (XLA's partition-id) in a step's CUDA graph, none of its kernels overlap:
    248 us of E2B's 2483 (docs/design.md, Overlap).
    """
    holder, row = jnp.divmod(ids, table.shape[0])
    found = jax.lax.all_gather(table[row], axis_name, to="invarying")
    return jnp.take_along_axis(found, _like_rows(holder, table)[None], axis=0, mode="clip")[0]


def _like_rows(of_ids: jax.Array, table: jax.Array) -> jax.Array:
    """Appends an axis of size 1 to an array [*ids.shape] for each axis of a row."""
    return jnp.expand_dims(of_ids, range(of_ids.ndim, of_ids.ndim + table.ndim - 1))
