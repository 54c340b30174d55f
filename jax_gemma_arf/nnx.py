"""Gemma building blocks for flax.nnx, to be called inside ``jax.shard_map``.

Names and shapes of the parameters are google-deepmind/gemma's. A module is made outside of
shard_map with the hidden units of all ranks; its state enters as ``param_specs`` says, and holds
the hidden units of one rank inside::

    specs = block.param_specs()
    graph, state = nnx.split(block)
    state = jax.device_put(state, jax.tree.map(functools.partial(jax.NamedSharding, mesh), specs))
    call = lambda state, h: nnx.merge(graph, state)(h)
    out = jax.shard_map(call, mesh=mesh, in_specs=(specs, P()), out_specs=P())(state, h)

A mesh in Explicit mode, the default of ``jax.make_mesh``, needs the ``device_put``: its shard_map
takes arrays that lie as in_specs says, and moves none.
"""

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from jax_gemma_arf._src import blocks
from jax_gemma_arf._src.mesh import AxisName
from jax_gemma_arf._src.operands import Implementation
from jax_gemma_arf._src.reference import rmsnorm


class MLP(nnx.Module):
    """Gemma's gated MLP: parameters gating_einsum [2, hidden_dim, D] and linear [hidden_dim, D]."""

    def __init__(
        self,
        features: int,
        hidden_dim: int,
        *,
        axis_name: AxisName,
        skip_all_reduce: bool = False,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters.

        Args:
          features: D, the width of a token.
          hidden_dim: of all ranks together.
          axis_name: the manual mesh axis (or axes) of tensor parallelism.
          skip_all_reduce: return this rank's partial sums, for a fused operation to reduce.
          dtype: of the parameters.
          rngs: with a stream "params".
        """
        normal = nnx.initializers.normal()
        shape = (hidden_dim, features)
        self.gating_einsum = nnx.Param(normal(rngs.params(), (2, *shape), dtype))
        self.linear = nnx.Param(normal(rngs.params(), shape, dtype))
        self.hidden_dim = hidden_dim
        self.axis_name = axis_name
        self.skip_all_reduce = skip_all_reduce

    def param_specs(self) -> nnx.State:
        """Returns how each parameter is sharded, in the structure of this module's state.

        Axes that nnx.vmap put in front (``out_axes=0``) are sharded over none.
        """
        return _specs(self)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        if _initializing():
            return x
        size = blocks.local_size(self.hidden_dim, self.axis_name)
        if self.linear.shape[:-1] != (size,):
            raise ValueError(
                f"the parameters must hold this rank's {size} of {self.hidden_dim} hidden units, "
                f"got {', '.join(map(str, self.linear.shape[:-1]))}; shard them as param_specs says"
                ", and call a stacked module in nnx.scan or nnx.vmap"
            )
        return blocks.mlp(
            x,
            self.gating_einsum[...],
            self.linear[...],
            axis_name=self.axis_name,
            skip_all_reduce=self.skip_all_reduce,
        )


class FeedForward(nnx.Module):
    """The second half of a block, ending in fused_post_ff or fused_sandwich.

    Parameters, as in an official block: pre_ffw_norm/scale [D], MLP's parameters in mlp,
    post_ffw_norm/scale [D] and, with layer_scalar, skip_scale [1].
    """

    def __init__(
        self,
        features: int,
        hidden_dim: int,
        *,
        axis_name: AxisName,
        scale_offset: float = 0.0,
        layer_scalar: bool = True,
        implementation: Implementation | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters.

        Args:
          features: D, the width of a token.
          hidden_dim: of all ranks together.
          axis_name, implementation: as in fused_post_ff.
          scale_offset: 0.0 for Gemma 4; 1.0 for Gemma 2 and 3.
          layer_scalar: whether there is one: Gemma 4, but for E2B and E4B, where it comes later.
          dtype: of the parameters.
          rngs: with a stream "params".
        """
        self.pre_ffw_norm = _Scale(jnp.full((features,), 1 - scale_offset, dtype))
        self.mlp = MLP(
            features,
            hidden_dim,
            axis_name=axis_name,
            skip_all_reduce=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_ffw_norm = _Scale(jnp.full((features,), 1 - scale_offset, dtype))
        self.skip_scale = nnx.Param(jnp.ones((1,), dtype)) if layer_scalar else None
        self.axis_name = axis_name
        self.scale_offset = scale_offset
        self.implementation = implementation

    def param_specs(self) -> nnx.State:
        """Returns how each parameter is sharded, in the structure of this module's state.

        Axes that nnx.vmap put in front (``out_axes=0``) are sharded over none.
        """
        return _specs(self)

    def __call__(
        self, h: jax.Array, next_norm_scale: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """The residual stream [..., D] to the block's output.

        With next_norm_scale [D], the norm that reads that output, to (output, output normed).
        """
        if _initializing():
            return blocks.while_initializing(h, next_norm_scale)
        normed = rmsnorm(h, self.pre_ffw_norm.scale[...], scale_offset=self.scale_offset)
        return blocks.tail(
            self.mlp(normed),
            h,
            self.post_ffw_norm.scale[...],
            None if self.skip_scale is None else self.skip_scale[...],
            next_norm_scale,
            axis_name=self.axis_name,
            scale_offset=self.scale_offset,
            implementation=self.implementation,
        )


class _Scale(nnx.Module):
    """The one parameter of a norm."""

    def __init__(self, scale: jax.Array):
        self.scale = nnx.Param(scale)


def _specs(module: MLP | FeedForward) -> nnx.State:
    """Returns specs over hidden units, the last axis but one of the parameters that have them."""

    def spec(path, parameter):
        names = {str(getattr(entry, "key", entry)) for entry in path}
        if names & {"gating_einsum", "linear"}:
            return blocks.stacked(P(module.axis_name), parameter.ndim - 2)
        return P()

    return jax.tree.map_with_path(spec, nnx.state(module))


def _initializing() -> bool:
    """Returns whether a linen module that wraps this one (nnx.bridge.to_linen) makes parameters."""
    modules = linen.module._context.module_stack
    return bool(modules) and modules[-1] is not None and modules[-1].is_initializing()
