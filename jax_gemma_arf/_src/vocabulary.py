"""Embedding lookup with the vocabulary split over ranks, inside ``jax.shard_map``.

Megatron-LM's vocabulary parallelism (arXiv:1909.08053, section 3): a rank looks up the rows that it
holds and puts zeros for the others, and one all-reduce of the rows found completes the lookup. The
few rows of a decode step are gathered instead: each rank sends the row that it would have if it
were the holder, and the holder's is taken.
"""

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
    holder, row = jnp.divmod(ids, rows)
    holder = jnp.expand_dims(holder, range(ids.ndim, ids.ndim + table.ndim - 1))
    found = table[row]
    if ranks * found.nbytes <= GATHER_MAX_BYTES:
        # For so small an all-reduce XLA has a kernel of its own, after which no program of the
        # process overlaps its kernels: 248 us of E2B's 2483 (docs/design.md, Overlap).
        candidates = jax.lax.all_gather(found, axis_name, to="invarying")
        return jnp.take_along_axis(candidates, holder[None], axis=0, mode="clip")[0]
    held = holder == jax.lax.axis_index(axis_name)
    return jax.lax.psum(jnp.where(held, found, jnp.zeros((), table.dtype)), axis_name)
