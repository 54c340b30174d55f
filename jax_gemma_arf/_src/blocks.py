"""The arithmetic of jax_gemma_arf.linen and jax_gemma_arf.nnx, as functions of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_gemma_arf._src.fused_ops import fused_post_ff, fused_sandwich
from jax_gemma_arf._src.mesh import AxisName


def mlp(
    x: jax.Array,
    gating_einsum: jax.Array,
    linear: jax.Array,
    *,
    axis_name: AxisName,
    skip_all_reduce: bool = False,
) -> jax.Array:
    """Gemma's gated MLP on this rank's hidden units, inside ``jax.shard_map``.

    Args:
      x: [..., D], replicated over axis_name.
      gating_einsum: [2, H, D], gate and up projection of this rank's H hidden units.
      linear: [H, D], their down-projection.
      axis_name: the manual mesh axis (or axes) of tensor parallelism.
      skip_all_reduce: return this rank's partial sums, for a fused operation to reduce.

    Returns:
      [..., D], reduced unless skip_all_reduce.
    """
    gate, up = jnp.einsum("...d,chd->c...h", x, gating_einsum)
    partial_sums = (jax.nn.gelu(gate) * up) @ linear
    return partial_sums if skip_all_reduce else jax.lax.psum(partial_sums, axis_name)


def tail(
    partial_sums: jax.Array,
    h: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | None = None,
    next_norm_scale: jax.Array | None = None,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The end of a half of a block: fused_post_ff, or fused_sandwich where a next norm is given.

    Args:
      partial_sums: [..., D], this rank's, of the half's last projection.
      h: [..., D], the residual stream, replicated over axis_name.
      norm_scale: [D], of the half's post-norm.
      layer_scalar: () or (1,), or None for 1.
      next_norm_scale: [D], of the norm that reads the result, or None.
      **options: the keyword arguments of fused_post_ff, of which axis_name must be given.

    Returns:
      The new residual stream, or with next_norm_scale that and its norm: [..., D] each, h.dtype.
    """
    if next_norm_scale is None:
        return fused_post_ff(partial_sums, h, norm_scale, layer_scalar, **options)
    return fused_sandwich(
        partial_sums, h, norm_scale, layer_scalar, next_norm_scale=next_norm_scale, **options
    )


def while_initializing(
    h: jax.Array, next_norm_scale: jax.Array | tuple[jax.Array, ...] | list[jax.Array] | None = None
) -> Any:
    """Stands in for ``tail`` while parameters are made: h in place of each result of its structure.

    Args:
      h: [..., D], the residual stream.
      next_norm_scale: as in fused_sandwich, or None.

    Returns:
      h, or with next_norm_scale (h, next_norm_scale with h in place of each array).
    """
    if next_norm_scale is None:
        return h
    return h, jax.tree.map(lambda _: h, next_norm_scale)


def stacked(spec: PartitionSpec, axes: int) -> PartitionSpec:
    """Returns the spec of a parameter with that many more axes in front, sharded over none."""
    return PartitionSpec(*(None,) * axes, *spec) if spec else spec


def local_size(hidden_dim: int, axis_name: AxisName) -> int:
    """Returns how many of hidden_dim hidden units each rank has.

    Raises:
      ValueError: if the ranks do not divide them, or outside a jax.shard_map over axis_name.
    """
    try:
        ranks = jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name must name manual axes, got {axis_name!r} where there is no such axis; call "
            "the module inside jax.shard_map over it (only init works outside)"
        ) from None
    if hidden_dim % ranks:
        raise ValueError(
            f"hidden_dim must be divisible by the {ranks} ranks of {axis_name!r}, got "
            f"{hidden_dim}; shard over fewer, or pad the hidden units with zeros"
        )
    return hidden_dim // ranks
