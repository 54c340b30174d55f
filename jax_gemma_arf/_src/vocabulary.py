"""Embedding lookup with the vocabulary split over ranks, inside ``jax.shard_map``.

Megatron-LM's vocabulary parallelism (arXiv:1909.08053, section 3): a rank looks up the rows that it
holds and puts zeros for the others, and one all-reduce of the rows found completes the lookup.
"""

import jax
import jax.numpy as jnp

from jax_gemma_arf._src.mesh import AxisName


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
    rows = table.shape[0]
    vocabulary = rows * jax.lax.axis_size(axis_name)
    ids = jnp.clip(jnp.where(ids < 0, ids + vocabulary, ids), 0, vocabulary - 1)
    local = ids - jax.lax.axis_index(axis_name) * rows
    held = (local >= 0) & (local < rows)
    held = jnp.expand_dims(held, range(ids.ndim, ids.ndim + table.ndim - 1))
    found = table[jnp.clip(local, 0, rows - 1)]
    return jax.lax.psum(jnp.where(held, found, jnp.zeros((), table.dtype)), axis_name)
