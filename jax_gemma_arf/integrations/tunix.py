"""google-tunix: its Gemma 3 and 4 models (flax nnx), tensor parallel and fused.

::

    from jax_gemma_arf.integrations.tunix import tensor_parallel

    model = tensor_parallel(model, mesh)

Everything else stays as it was: parameters with their names and shardings, checkpoints, LoRA and
QLoRA by qwix, samplers and trainers. Tunix leaves the collectives to the compiler. Here the last
projection of each half of a layer moves into a shard_map with the tail behind it: the projection is
Tunix's own module, called on the slices of one rank, so that what has been added to the module
takes part.
"""

import dataclasses
import functools
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jax_gemma_arf._src.lowering import SAVED_SUMS
from jax_gemma_arf._src.mesh import axis_names, group_size
from jax_gemma_arf._src.operands import Implementation
from jax_gemma_arf._src.reference import rmsnorm
from jax_gemma_arf._src.row_parallel import Projection, row_parallel_moe_tail, row_parallel_post_ff

#: The versions of google-tunix whose layers this module knows: it calls parts of them.
VERSIONS = ("0.1.7",)


def _check_version() -> None:
    try:
        found = metadata.version("google-tunix")
    except metadata.PackageNotFoundError:
        found = "none"
    if found not in VERSIONS:
        raise ImportError(
            f"jax_gemma_arf.integrations.tunix needs google-tunix {' or '.join(VERSIONS)}, found "
            f"{found}: pip install 'jax-gemma-arf[tunix]'"
        )


_check_version()
from tunix.models.gemma3 import model as _gemma3  # noqa: E402
from tunix.models.gemma4 import model as _gemma4  # noqa: E402


@dataclasses.dataclass(frozen=True)
class _Site:
    """Where and how the tails of a model run."""

    mesh: Mesh
    axis_name: str
    implementation: Implementation | None


def tensor_parallel(
    model: Any,
    mesh: Mesh,
    *,
    axis_name: str = "tp",
    implementation: Implementation | None = None,
) -> Any:
    """Makes the layers of a Tunix model end in fused tails, in place.

    A dense layer, and one of 26B-A4B, is then two launches. With per-layer inputs (E2B, E4B) it is
    three, since Tunix shards their projection as well. The residual stream is replicated over
    axis_name, whatever ``shd_config.act_btd`` says. LoRA may be applied before or after.

    For the least collectives, create the model with ``shd_config.rms_norm_weight`` ``(None,)``:
    otherwise every norm gathers its scale. Create 26B-A4B with ``exp_weight_edf``
    ``("fsdp", None, "tp", None)``: otherwise every layer reshards the weights of its experts.

    Args:
      model: a Gemma3 or Gemma4 of tunix.models, with or without LoRA.
      mesh: the mesh that its parameters lie on, all axes Auto.
      axis_name: the axis of tensor parallelism, over which shd_config shards heads and hidden
        units. Other axes in ``shd_config.act_btd`` shard the tokens, where they divide the batch.
      implementation: as in fused_post_ff.

    Returns:
      model.

    Raises:
      TypeError: if model is of another type.
      ValueError: if the mesh lacks the axis or has axes that are not Auto. When the model runs:
        if a projection is not sharded over axis_name, or has random state (dropout of LoRA).
    """
    axis_names(axis_name, mesh)
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            "mesh must have Auto axes, since Tunix leaves the collectives to the compiler, got "
            f"{mesh}; pass axis_types=(AxisType.Auto,) * {len(mesh.axis_names)} to jax.make_mesh"
        )
    families = {_gemma3.Gemma3: _gemma3_layer, _gemma4.Gemma4: _gemma4_layer}
    layer_class = next((made for kind, made in families.items() if isinstance(model, kind)), None)
    if layer_class is None:
        raise TypeError(
            "model must be a Gemma3 or Gemma4 of tunix.models, got "
            f"{type(model).__module__}.{type(model).__qualname__}"
        )
    site = _Site(mesh, axis_name, implementation)
    for layer in model.layers:
        layer.__class__ = layer_class(_unfused(type(layer)), site)
        attention = layer.attn
        for owner, name in ((attention, "attn_vec_einsum"), (layer.mlp, "down_proj")):
            projection = getattr(owner, name)
            projection.__class__ = _deferred(_unfused(type(projection)))
        # Attention constrains its result, which is now what its projection reads.
        if isinstance(model, _gemma3.Gemma3):
            attention.shd_config = _constraining_heads(attention.shd_config)
        else:
            shd_config = _constraining_heads(attention.config.shd_config)
            attention.config = dataclasses.replace(attention.config, shd_config=shd_config)
    return model


def _constraining_heads(shd_config: Any) -> Any:
    return dataclasses.replace(shd_config, act_btd=shd_config.act_btnh)


def _unfused(kind: type) -> type:
    """Returns Tunix's class behind one of those made here."""
    return getattr(kind, "unfused", kind)


def _initializing(module: nnx.Module) -> bool:
    """Returns whether qwix runs the model to find its weights: in that run
    everything must be where Tunix has it."""
    return getattr(module, "disable_quant_stats_update", False)


@functools.cache
def _deferred(kind: type) -> type:
    """Makes a projection return what it would project, for a tail to call it."""

    def __call__(self, x):
        return kind.__call__(self, x) if _initializing(self) else x

    return type(kind.__name__, (kind,), {"unfused": kind, "__call__": __call__})


def _projection(module: nnx.Module, x: jax.Array, site: _Site, **options: Any) -> Projection:
    """Returns the projection of x by a module of Tunix, with what qwix has added to it."""
    graph, state = nnx.split(module)
    if jax.tree.leaves(nnx.state(module, nnx.RngState)):
        raise ValueError(
            f"{type(module).__name__} must have no random state, such as LoRA's dropout has, "
            "which one rank cannot advance for all"
        )
    specs = nnx.get_partition_spec(state)
    sharded = {axis for spec in jax.tree.leaves(specs) for axis in _axes(spec)}
    if site.axis_name not in sharded:
        raise ValueError(
            f"{type(module).__name__} must be sharded over axis_name {site.axis_name!r}, got the "
            f"specs {jax.tree.leaves(specs)}; see shd_config of the model"
        )
    leaves, tree = jax.tree.flatten(state)
    specs = jax.tree.leaves(specs)

    def project(leaves, x):
        return _call(nnx.merge(graph, tree.unflatten(leaves)), x)

    return Projection(project, leaves, x, params_spec=specs, check_linear=False, **options)


def _axes(spec: P) -> tuple[str, ...]:
    return tuple(jax.tree.leaves(tuple(spec)))


def _call(module: nnx.Module, x: jax.Array) -> jax.Array:
    return _unfused(type(module)).__call__(module, x)


def _tail(
    site: _Site,
    layer: Any,
    module: nnx.Module,
    x: jax.Array,
    residual: jax.Array,
    norm: Any,
    **more,
) -> Any:
    """The end of a half of a layer: projection, all-reduce, norm and residual."""
    projection = _projection(module, x, site)
    return row_parallel_post_ff(
        projection.project,
        projection.params,
        x,
        residual,
        norm.scale.value,
        params_spec=projection.params_spec,
        check_linear=False,
        **_options(site, layer, residual),
        **more,
    )


def _after_attention(site: _Site, layer: Any, heads: jax.Array, residual: jax.Array, following):
    """The end of the first half of a layer, and the norms that follow, with their scales."""
    return _tail(
        site,
        layer,
        layer.attn.attn_vec_einsum,
        heads,
        residual,
        layer.post_attention_norm,
        next_norm_scale=following,
    )


def _pre_norm(site: _Site, layer: Any, x: jax.Array) -> jax.Array:
    """Computes the norm that a layer begins with. From a scale that lies sharded the compiler would
    make rows that are sharded alike, and gather those."""
    scale = jax.lax.with_sharding_constraint(
        layer.pre_attention_norm.scale.value, jax.NamedSharding(site.mesh, P())
    )
    return rmsnorm(x, scale, scale_offset=_scale_offset(layer))


def _scale_offset(layer: Any) -> float:
    return 1.0 if isinstance(layer, _gemma3.DecoderLayer) else 0.0


def _options(site: _Site, layer: Any, residual: jax.Array) -> dict[str, Any]:
    return {
        "mesh": site.mesh,
        "axis_name": site.axis_name,
        "token_spec": _token_spec(site, layer.config.shd_config.act_btd, residual.shape),
        "scale_offset": _scale_offset(layer),
        "implementation": site.implementation,
    }


def _token_spec(site: _Site, act_btd: tuple[Any, ...], shape: tuple[int, ...]) -> P:
    """Returns how batch and sequence are sharded: not where the mesh does not divide them."""
    entries = []
    for length, entry in zip(shape[:-1], act_btd):
        axes = tuple(a for a in _axes(P(entry)) if a in site.mesh.shape and a != site.axis_name)
        entries.append(None if length % group_size(site.mesh, axes) else axes or None)
    return P(*entries)


def _remat(layer: Any, half: Any) -> Any:
    """Recomputes a half of a layer in the backward pass where Tunix recomputes its module: all but
    the all-reduce."""
    kind = type(layer.config.remat_config)
    if layer.config.remat_config not in (kind.BLOCK, kind.BLOCK.value):
        return half
    policy = jax.checkpoint_policies.save_only_these_names(SAVED_SUMS)
    return nnx.remat(half, policy=policy, graph_updates=False)


@functools.cache
def _gemma3_layer(kind: type, site: _Site) -> type:
    def attend(self, x, *arguments):
        cache, heads = self.attn.block(_pre_norm(site, self, x), *arguments)
        hidden, normed = _after_attention(site, self, heads, x, self.pre_ffw_norm.scale.value)
        return cache, hidden, normed

    def feed_forward(self, hidden, normed):
        units = self.mlp.block(normed)
        return _tail(site, self, self.mlp.down_proj, units, hidden, self.post_ffw_norm)

    def block(self, x, segment_pos, cache, attn_mask):
        if _initializing(self):
            return kind.block(self, x, segment_pos, cache, attn_mask)
        cache, *rows = _remat(self, attend)(self, x, segment_pos, cache, attn_mask)
        return cache, _remat(self, feed_forward)(self, *rows)

    return type(kind.__name__, (kind,), {"unfused": kind, "block": block})


@functools.cache
def _gemma4_layer(kind: type, site: _Site) -> type:
    def attend(self, x, *arguments):
        norm = _pre_norm(site, self, x).astype(self.config.dtype)
        cache, heads, kv = self.attn.block(norm, *arguments)
        following = (self.pre_ffw_norm.scale.value,)
        if self.config.enable_moe:
            following += (self.moe_pre_ffw_norm.scale.value,)
        hidden, normed = _after_attention(site, self, heads, x, following)
        return cache, kv, hidden, [row.astype(self.config.dtype) for row in normed]

    def feed_forward(self, hidden, normed, per_layer_input: Any):
        units = self.mlp.block(normed[0])
        inputs = per_layer_input if self.config.per_layer_input_dim > 0 else None
        skip_scale = self.skip_scale.value
        # Tunix multiplies by the scalar outside of any cast, so this is the dtype of the result.
        dtype = jnp.result_type(hidden, skip_scale)
        scalar = None
        if inputs is None:
            hidden, scalar = hidden.astype(dtype), skip_scale
        if self.config.enable_moe:
            hidden = row_parallel_moe_tail(
                _projection(self.mlp.down_proj, units, site),
                _experts(self.moe, normed[1], site, self),
                hidden,
                scalar,
                dense_norm_scale=self.dense_post_ffw_norm.scale.value,
                expert_norm_scale=self.moe_post_ffw_norm.scale.value,
                norm_scale=self.post_ffw_norm.scale.value,
                check_vma=False,
                **_options(site, self, hidden),
            )
        else:
            hidden = _tail(
                site,
                self,
                self.mlp.down_proj,
                units,
                hidden,
                self.post_ffw_norm,
                layer_scalar=scalar,
            )
        if inputs is None:
            return hidden
        mapped = jax.nn.gelu(self.per_layer_input_gate(hidden)) * inputs
        return _tail(
            site,
            self,
            self.per_layer_projection,
            mapped,
            hidden.astype(dtype),
            self.post_per_layer_input_norm,
            layer_scalar=skip_scale,
        )

    def block(self, x, segment_pos, cache, attn_mask, per_layer_input=None, kv_shared_cache=None):
        arguments = segment_pos, cache, attn_mask
        if _initializing(self):
            return kind.block(self, x, *arguments, per_layer_input, kv_shared_cache)
        cache, kv, *rows = _remat(self, attend)(self, x, *arguments, kv_shared_cache)
        return cache, _remat(self, feed_forward)(self, *rows, per_layer_input), kv

    return type(kind.__name__, (kind,), {"unfused": kind, "block": block})


def _experts(module: nnx.Module, x: jax.Array, site: _Site, layer: Any) -> Projection:
    """Returns the routed experts, each rank with a slice of the hidden units of all of them."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    units = {"gating_einsum": P(None, None, site.axis_name), "linear": P(None, site.axis_name)}
    specs = [units.get(path[0].key, P()) for path, _ in jax.tree_util.tree_leaves_with_path(state)]

    def project(leaves, x):
        local: Any = nnx.merge(graph, tree.unflatten(leaves))
        local.hidden_dim //= site.mesh.shape[site.axis_name]
        return local(x)

    x_spec = _token_spec(site, layer.config.shd_config.act_btd, x.shape)
    return Projection(project, leaves, x, params_spec=specs, x_spec=x_spec, check_linear=False)
