"""Gemma building blocks for flax.linen, to be applied inside ``jax.shard_map``.

Names and shapes of the parameters are google-deepmind/gemma's. ``init``, outside of shard_map,
makes the hidden units of all ranks, and returns its input in place of each result; ``apply``,
inside, reads the hidden units of its own rank, so that parameters enter the shard_map as
``param_specs`` says::

    specs = {"params": block.param_specs()}
    variables = block.init(jax.random.key(0), h)
    places = jax.tree.map(functools.partial(jax.NamedSharding, mesh), specs)
    variables = jax.device_put(variables, places)
    out = jax.shard_map(block.apply, mesh=mesh, in_specs=(specs, P()), out_specs=P())(variables, h)

A mesh in Explicit mode, the default of ``jax.make_mesh``, needs the ``device_put``: its shard_map
takes arrays that lie as in_specs says, and moves none.
"""

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jax_gemma_arf._src import blocks
from jax_gemma_arf._src.mesh import AxisName
from jax_gemma_arf._src.operands import Implementation
from jax_gemma_arf._src.reference import rmsnorm


class MLP(nn.Module):
    """Gemma's gated MLP: parameters gating_einsum [2, hidden_dim, D] and linear [hidden_dim, D].

    Attributes:
      hidden_dim: of all ranks together.
      axis_name: the manual mesh axis (or axes) of tensor parallelism.
      skip_all_reduce: return this rank's partial sums, for a fused operation to reduce.
    """

    hidden_dim: int
    axis_name: AxisName
    skip_all_reduce: bool = False

    def param_specs(self, *, stacked: int = 0) -> dict[str, P]:
        """Returns how each parameter is sharded.

        Args:
          stacked: how many axes nn.scan and nn.vmap (``variable_axes={"params": 0}``) put in front.
        """
        specs = {"gating_einsum": P(None, self.axis_name), "linear": P(self.axis_name)}
        return {name: blocks.stacked(spec, stacked) for name, spec in specs.items()}

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        size = self.hidden_dim
        if not self.is_initializing():
            size = blocks.local_size(size, self.axis_name)
        features = x.shape[-1]
        normal = nn.initializers.normal()
        gating_einsum = self.param("gating_einsum", normal, (2, size, features), x.dtype)
        linear = self.param("linear", normal, (size, features), x.dtype)
        if self.is_initializing():
            return x
        return blocks.mlp(
            x,
            gating_einsum,
            linear,
            axis_name=self.axis_name,
            skip_all_reduce=self.skip_all_reduce,
        )


class FeedForward(nn.Module):
    """The second half of a block, ending in fused_post_ff or fused_sandwich.

    Parameters, as in an official block: pre_ffw_norm/scale [D], MLP's parameters in mlp,
    post_ffw_norm/scale [D] and, with layer_scalar, skip_scale [1].

    Attributes:
      hidden_dim: of all ranks together.
      axis_name: as in fused_post_ff.
      scale_offset: 0.0 for Gemma 4; 1.0 for Gemma 2 and 3.
      layer_scalar: whether there is one: Gemma 4, but for E2B and E4B, where it comes later.
      implementation: as in fused_post_ff.

    Example:
      >>> block = linen.FeedForward(hidden_dim=512, axis_name="tp")
      >>> h = jnp.ones((4, 256))
      >>> params = block.init(jax.random.key(0), h)["params"]
      >>> @jax.shard_map(mesh=mesh, in_specs=(block.param_specs(), P()), out_specs=P())
      ... def apply(params, h):
      ...     return block.apply({"params": params}, h)
      >>> apply(params, h).shape
      (4, 256)
    """

    hidden_dim: int
    axis_name: AxisName
    scale_offset: float = 0.0
    layer_scalar: bool = True
    implementation: Implementation | None = None

    def param_specs(self, *, stacked: int = 0) -> dict[str, P | dict[str, P]]:
        """Returns how each parameter is sharded.

        Args:
          stacked: how many axes nn.scan and nn.vmap (``variable_axes={"params": 0}``) put in front.
        """
        mlp = MLP(self.hidden_dim, self.axis_name, parent=None).param_specs(stacked=stacked)
        specs = {"pre_ffw_norm": {"scale": P()}, "mlp": mlp, "post_ffw_norm": {"scale": P()}}
        return specs | ({"skip_scale": P()} if self.layer_scalar else {})

    @nn.compact
    def __call__(
        self, h: jax.Array, next_norm_scale: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """The residual stream [..., D] to the block's output.

        With next_norm_scale [D], the norm that reads that output, to (output, output normed).
        """
        ones = nn.initializers.constant(1 - self.scale_offset)  # a scale of 1 in all

        def scale(name: str) -> jax.Array:
            return _Scale(h.shape[-1], ones, h.dtype, name=name)()

        normed = rmsnorm(h, scale("pre_ffw_norm"), scale_offset=self.scale_offset)
        mlp = MLP(self.hidden_dim, self.axis_name, skip_all_reduce=True, name="mlp")
        partial_sums, norm_scale = mlp(normed), scale("post_ffw_norm")
        skip_scale = None
        if self.layer_scalar:
            skip_scale = self.param("skip_scale", nn.initializers.ones, (1,), h.dtype)
        if self.is_initializing():
            return blocks.while_initializing(h, next_norm_scale)
        return blocks.tail(
            partial_sums,
            h,
            norm_scale,
            skip_scale,
            next_norm_scale,
            axis_name=self.axis_name,
            scale_offset=self.scale_offset,
            implementation=self.implementation,
        )


class _Scale(nn.Module):
    """The one parameter of a norm."""

    features: int
    initializer: nn.initializers.Initializer
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("scale", self.initializer, (self.features,), self.dtype)
