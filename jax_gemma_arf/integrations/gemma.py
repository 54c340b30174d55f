"""google-deepmind/gemma (PyPI ``gemma``): its Gemma 2, 3 and 4 models, tensor parallel and fused.

::

    model = tensor_parallel(gm.nn.Gemma4_31B(), mesh)
    params = jax.device_put(params, param_shardings(model, params))

Everything else stays as it was: the parameter tree and its names, ``model.apply``, ``init``,
``init_cache`` and the samplers of ``gm.text``. All blocks run in one ``jax.shard_map``, each with
the official attention and feed-forward modules at this rank's number of heads and hidden units, so
that both end in partial sums, for the fused operations to reduce. Where XLA compiles the official
code badly for GPUs, an equivalent stands in: embedding and logits, which are split over the
vocabulary, attention and feed-forward in a decode step (_gemma_decode.py), and the experts
(_gemma_experts.py).
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import gemma
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from gemma.gm.nn import _modules as _gemma3_modules
from gemma.gm.nn import _transformer as _gemma3
from gemma.gm.nn.gemma3n import _transformer as _gemma3n
from gemma.gm.nn.gemma4 import _modules as _gemma4_modules
from gemma.gm.nn.gemma4 import _transformer as _gemma4
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from kauldron import kd

from jax_gemma_arf._src.fused_ops import fused_moe_tail, fused_post_ff, fused_sandwich
from jax_gemma_arf._src.mesh import AxisName, axis_names, group_size
from jax_gemma_arf._src.operands import Implementation
from jax_gemma_arf._src.reference import rmsnorm
from jax_gemma_arf._src.vocabulary import lookup
from jax_gemma_arf.integrations import _gemma_wrappers as wrappers
from jax_gemma_arf.integrations import _mesh_modes
from jax_gemma_arf.integrations._gemma_decode import attend as decode_attention
from jax_gemma_arf.integrations._gemma_decode import feed_forward as decode_feed_forward
from jax_gemma_arf.integrations._gemma_decode import opaque_one
from jax_gemma_arf.integrations._gemma_experts import run_experts

#: Releases of the package whose blocks were compared with those restated here.
TESTED_VERSIONS = ("4.0.1", "4.1.0")

_EMBEDDERS = (_gemma3_modules.Embedder, _gemma4_modules.Embedder)

# scale_offset of each family: Gemma 2 and 3 store w for a scale of 1 + w. _transformer.Transformer
# is the base of both, and of Gemma 3n, whose blocks are built otherwise.
_SCALE_OFFSET = {_gemma3.Transformer: 1.0, _gemma4.Transformer: 0.0}

# The axis of each block parameter that is split over the ranks: heads, hidden units or, at the
# other end, the rows of the two projections whose outputs are partial sums.
_SHARDED_AXIS = {
    ("attn", "q_einsum", "w"): 0,
    ("attn", "k_einsum", "w"): 0,
    ("attn", "kv_einsum", "w"): 1,
    ("attn", "qkv_einsum", "w"): 1,
    ("attn", "attn_vec_einsum", "w"): 0,
    ("mlp", "gating_einsum"): 1,
    ("mlp", "linear"): 0,
    # Gemma 4 26B-A4B, whose mlp holds the experts.
    ("mlp2", "gating_einsum"): 1,
    ("mlp2", "linear"): 0,
    ("mlp", "gating_einsum", "w"): 2,
    ("mlp", "linear", "w"): 1,
}
_SHARDED_AXIS |= wrappers.sharded_axes(_SHARDED_AXIS)
# The same of the vision encoder, which the compiler partitions: by the end of the path, and counted
# from the end of the shape, since Gemma 4 stacks the layers. SigLIP in Gemma 3, then Gemma 4.
_VISION_AXIS: dict[tuple[str, ...], int] = {
    **{(name, leaf): -2 for name in ("query", "key", "value") for leaf in ("kernel", "bias")},
    ("out", "kernel"): -3,
    ("Dense_0", "kernel"): -1,
    ("Dense_0", "bias"): -1,
    ("Dense_1", "kernel"): -2,
    **{(name, "w"): -3 for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")},
    ("gating_einsum", "w"): -2,
    ("linear", "w"): -2,
}
_KV_PROJECTIONS = ("k_einsum", "kv_einsum")


def _warn_if_untested(version: str) -> None:
    if version not in TESTED_VERSIONS:
        warnings.warn(
            f"gemma {version} is not a release that jax_gemma_arf.integrations.gemma was tested "
            f"with ({', '.join(TESTED_VERSIONS)}). Parts of its models are restated here, and may "
            "have changed: compare the logits with the official model's",
            stacklevel=3,
        )


_warn_if_untested(gemma.__version__)


def tensor_parallel[Model: nn.Module](
    model: Model,
    mesh: Mesh,
    axis_name: AxisName = "tp",
    *,
    batch_axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> Model:
    """The same model with tensor parallel blocks that end in fused all-reduces.

    A dense block has two, fused_sandwich after attention and after the feed-forward, each with the
    norm of what comes next. The per-layer inputs of E2B and E4B come between the second and the
    next norm, so there it is fused_post_ff. 26B-A4B ends in fused_moe_tail.

    KV heads: an axis that divides them splits them. One that is a multiple of them has each held by
    several ranks, in caches too, which then have as many KV heads as there are ranks;
    ``model.init_cache`` makes them.

    Args:
      model: an instance of ``gm.nn.Gemma2_*``, ``Gemma3_*``, ``Gemma4_*`` or of your own
        Transformer class with their config; or one of them in ``gm.nn.LoRA`` or
        ``gm.nn.IntWrapper``, which may as well be put around the result.
      mesh: the mesh, in either mode. The model runs in Auto mode, all axes manual in the blocks;
        docs/sharp_bits.md says in which mode results are. ``model.mesh`` is in Auto mode.
      axis_name: its axis (or axes) of tensor parallelism.
      batch_axis_name: an axis (or axes) over which tokens and caches are sharded along the batch.
      implementation: as in :func:`jax_gemma_arf.fused_post_ff`.

    Returns:
      An instance of a subclass of ``type(model)``; of a wrapper, the same around such a model.

    Raises:
      TypeError: if the model's class is none of these, or mesh is no Mesh.
      ValueError: if the mesh lacks an axis, if the axis does not fit the numbers of heads, KV heads
        or hidden units (the error says which, and what sizes would), or if the model has no
        post-attention and post-FF norms (Gemma 1).
    """
    if isinstance(model, wrappers.WRAPPERS) and not isinstance(model.model, wrappers.WRAPPERS):
        inner = tensor_parallel(
            model.model,
            mesh,
            axis_name,
            batch_axis_name=batch_axis_name,
            implementation=implementation,
        )
        return model.clone(model=inner)
    cls = type(model)
    if not issubclass(cls, tuple(_SCALE_OFFSET)) or issubclass(cls, _gemma3n.Gemma3nTransformer):
        raise TypeError(
            "model must be an official Gemma 2, 3 or 4 Transformer, in one wrapper at most "
            f"(gm.nn.Gemma4_31B(), gm.nn.LoRA(model=gm.nn.Gemma3_4B(), rank=4), ...), got "
            f"{cls.__module__}.{cls.__qualname__}"
        )
    if isinstance(model, _TensorParallel):
        raise TypeError("model is tensor parallel already; pass the official one")
    if not isinstance(mesh, Mesh):
        raise TypeError(
            'mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ("tp",)), got '
            f"{type(mesh).__name__}"
        )
    mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    names = axis_names(axis_name, mesh)
    batch = () if batch_axis_name is None else axis_names(batch_axis_name, mesh, "batch_axis_name")
    if overlap := set(names) & set(batch):
        raise ValueError(f"axis_name and batch_axis_name must not share axes, got {overlap}")
    _check_config(cls.__name__, model.config, names, group_size(mesh, names))
    return _subclass(cls)(
        **_fields(model),
        mesh=mesh,
        tp_axes=names,
        batch_axes=batch,
        implementation=implementation,
    )


def param_shardings(model: nn.Module, params: Any = None) -> Any:
    """How the parameters of a tensor parallel model lie on its mesh.

    Args:
      model: from :func:`tensor_parallel`.
      params: a parameter tree of arrays or shapes, such as a checkpoint's; None for what
        ``model.init`` makes of text. Complete checkpoints of Gemma 4 have more: pass theirs.

    Returns:
      The same tree of NamedSharding; the mesh is in the mode of the context mesh, else in Auto
      mode. The vocabulary is split where the ranks divide it, else whole on each. Use it with
      ``jax.device_put`` or ``jax.jit``. This restores a checkpoint that no device holds alone::

          shardings = functools.partial(param_shardings, model)
          params = gm.ckpts.load_params(path, sharding=shardings)

    Raises:
      TypeError: if model is not from tensor_parallel.
      ValueError: if params is not the tree that ``model.apply({"params": params}, ...)`` takes.
    """
    transformer = wrappers.unwrap(model)
    if not isinstance(transformer, _TensorParallel):
        raise TypeError(
            f"model must come from tensor_parallel, got {type(transformer).__qualname__}"
        )
    if params is None:
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    if hasattr(params, "tree"):  # in which gm.ckpts.load_params wraps a checkpoint for sharding=
        return params.replace(tree=param_shardings(model, params.tree))
    if "layer_0" not in params or "embedder" not in params:
        raise ValueError(
            'params must be the tree that model.apply({"params": params}) takes, with "embedder" '
            f'and "layer_0" at its top, got the keys {sorted(map(str, params))[:3]}; nest flat '
            'names with flax.traverse_util.unflatten_dict(params, sep="/")'
        )
    mesh = _mesh_modes.callers_mesh(transformer.mesh) or transformer.mesh
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, transformer.param_spec(_keys(path), leaf.shape)),
        params,
    )


def _check_config(name: str, config: Any, names: tuple[str, ...], size: int) -> None:
    if not (config.use_post_attn_norm and config.use_post_ffw_norm):
        raise ValueError(
            f"{name} has no norms after attention and feed-forward, which are what is fused; "
            "Gemma 2, 3 and 4 have"
        )
    divided = {"num_heads": config.num_heads}
    if getattr(config, "enable_moe", False):
        divided |= {
            "moe_dense_hidden_dim": config.moe_dense_hidden_dim,
            "expert_dim": config.expert_dim,
        }
    else:
        divided["hidden_dim"] = config.hidden_dim
    if wide := getattr(config, "override_kv_shared_ffw_hidden", None):
        divided["override_kv_shared_ffw_hidden"] = wide
    kv = {"num_kv_heads": config.num_kv_heads}
    if global_kv := getattr(config, "num_global_kv_heads", None):
        kv["num_global_kv_heads"] = global_kv

    def misfits(size: int) -> list[str]:
        return [f"{key}={n} must be divisible by it" for key, n in divided.items() if n % size] + [
            f"{key}={n} must be divisible by it or divide it"
            for key, n in kv.items()
            if n % size and size % n
        ]

    if wrong := misfits(size):
        works = [n for n in range(1, config.num_heads + 1) if not misfits(n)]
        raise ValueError(
            f"the {size} ranks of {names} do not fit {name}: {'; '.join(wrong)}. Sizes that fit: "
            f"{works}"
        )


def _fields(module: nn.Module) -> dict[str, Any]:
    """Returns the arguments that construct the module again, outside of its parent."""
    fields = (f.name for f in dataclasses.fields(module) if f.init and f.name != "parent")
    return {name: getattr(module, name) for name in fields}


def _keys(path: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", entry)) for entry in path)


class _TensorParallel:
    """Marks the classes that _subclass makes."""


@functools.cache
def _subclass(cls: type) -> type:
    """cls with its blocks run by _run_blocks. Its setup, which makes the parameters, is cls's."""

    class TensorParallel(_TensorParallel, cls):
        _: dataclasses.KW_ONLY
        mesh: Mesh
        tp_axes: tuple[str, ...]
        batch_axes: tuple[str, ...]
        implementation: Implementation | None

        def param_spec(self, path: tuple[str, ...], shape: tuple[int, ...]) -> P:
            """Returns the spec of the parameter at path."""
            size = group_size(self.mesh, self.tp_axes)
            if path[0] == "embedder" and path[-1] in ("input_embedding", "per_layer_embeddings"):
                return P(self.tp_axes) if shape[0] % size == 0 else P()
            if path[0] == "vision_encoder":
                axis = _VISION_AXIS.get(path[-2:])
                if axis is None or shape[axis] % size:
                    return P()
                return P(*(None,) * (len(shape) + axis), self.tp_axes)
            axis = _SHARDED_AXIS.get(path[1:]) if path[0].startswith("layer_") else None
            if axis is None:
                return P()
            if axis == 1 and path[2].endswith("gating_einsum"):  # [2, hidden_dim, D] or [2, D, ...]
                axis = 1 if getattr(self.config, "transpose_gating_einsum", True) else 2
            if shape[axis] < size:  # KV heads that several ranks share, or a scale that all share
                return P()
            return P(*(None,) * axis, self.tp_axes)

        def batch_spec(self, batch: int) -> P:
            """Returns the spec of an array by its batch, its first axis; whole if not divided."""
            divides = batch % group_size(self.mesh, self.batch_axes) == 0
            return P(self.batch_axes if divides else None)

        def __reduce__(self):
            # Python finds neither this class by its name nor the devices of a mesh.
            mesh = self.mesh
            devices = [(device.platform, device.id) for device in mesh.devices.flat]
            fields = _fields(self) | {"mesh": (devices, mesh.axis_sizes, mesh.axis_names)}
            return _unpickle, (cls, fields)

        def apply(self, variables, *args, capture_intermediates=False, **kwargs):
            if capture_intermediates:  # kauldron's trainer always asks for them
                warnings.warn(
                    "capture_intermediates gets only the results of modules outside of the blocks: "
                    "the blocks of a tensor parallel model run in one jax.shard_map, without the "
                    "modules whose results Flax captures. return_hidden_states=True returns the "
                    "last ones; capture the others in the official model",
                    stacklevel=2,
                )
            _check_placement(self, variables.get("params", {}))
            return super().apply(
                variables, *args, capture_intermediates=capture_intermediates, **kwargs
            )

        def cache_shardings(self, cache: Any) -> Any:
            """Returns the shardings of a cache, given its arrays or their shapes."""
            mesh = _mesh_modes.callers_mesh(self.mesh) or self.mesh
            specs = self.cache_specs(cache, explicit=bool(mesh.explicit_axes))
            return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

        def cache_specs(self, cache: Any, *, explicit: bool = False) -> Any:
            """Returns the specs of a cache, given its arrays or their shapes.

            explicit: on a mesh in Explicit mode. The lengths are whole there, because the official
            samplers index them, which that mode refuses along a sharded axis.
            """

            def spec(path, array):  # KV heads [B, S, K, H], positions or lengths
                name = path[-1].key
                if explicit and name == "end_index":
                    return P()
                heads = (None, self.tp_axes) if name in ("k", "v") else ()
                return P(*self.batch_spec(array.shape[0]), *heads)

            return jax.tree.map_with_path(spec, cache)

        # Compiled, as the official one, so that no device ever holds the whole cache.
        @functools.partial(
            nn.jit, static_argnames=("self", "batch_size", "dtype", "cache_length", "sharding")
        )
        def init_cache(self, *, batch_size, dtype, cache_length, sharding=None):
            """Returns the official cache, with each KV head once for each rank that holds it."""
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                cache = self.config.init_cache(
                    batch_size=batch_size, dtype=dtype, cache_length=cache_length
                )
                for layer in cache.values():
                    copies = _copies(self, layer["k"].shape[2])
                    layer.update(
                        {name: jnp.repeat(layer[name], copies, axis=2) for name in ("k", "v")}
                    )
                if sharding is None:
                    sharding = self.cache_shardings(cache)
                sharding = jax.tree.map(_mesh_modes.sharding_in_auto_mode, sharding)
                cache = kd.sharding.with_sharding_constraint(cache, sharding)
            mesh = _mesh_modes.callers_mesh(self.mesh) or self.mesh
            return _mesh_modes.in_mode_of(mesh, cache, self.cache_specs(cache, explicit=True))

        @functools.wraps(cls.__call__)
        def __call__(self, tokens, **kwargs):
            wrapped = wrappers.check_active()
            if self.is_initializing():
                return super().__call__(_mesh_modes.blank(tokens), **_mesh_modes.blank(kwargs))
            if wrapped:  # apply was the wrapper's
                _check_placement(self, self.variables.get("params", {}))
            mesh = _mesh_modes.callers_mesh(self.mesh, (tokens, kwargs))
            explicit = mesh is not None and mesh.explicit_axes
            with nn.intercept_methods(functools.partial(_vocabulary_parallel, self)):
                if explicit or _mesh_modes.any_explicit((self.variables, tokens, kwargs)):
                    arrays = {k: v for k, v in kwargs.items() if _mesh_modes.has_arrays(v)}
                    static = tuple((k, v) for k, v in kwargs.items() if k not in arrays)
                    out = self._call_in_auto_mode(tokens, arrays, static=static)
                else:
                    out = super().__call__(tokens, **kwargs)
            if mesh is None:
                logits, hidden = _mesh_modes.without_mesh((out.logits, out.hidden_states))
                out = out.replace(logits=logits, hidden_states=hidden)
            return out

        # Compiled, so that no array is converted at run time.
        @functools.partial(nn.jit, static_argnames=("self", "static"))
        def _call_in_auto_mode(self, tokens, arrays, *, static):
            """Calls the model with arguments in any mode; results are in the caller's."""
            convert = functools.partial(_mesh_modes.in_auto_mode, self.mesh)
            call = nn.map_variables(cls.__call__, "params", convert)
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                out = call(self, convert(tokens), **convert(arrays), **dict(static))
            mesh = _mesh_modes.callers_mesh(self.mesh, (tokens, arrays))
            if mesh is None:
                return out
            # In Explicit mode the batch is sharded as the tokens are, the vocabulary not at all.
            batch = P(*jax.typeof(tokens).sharding.spec[:-1])
            specs = jax.tree.map(lambda _: batch, out)
            specs = specs.replace(cache=self.cache_specs(out.cache, explicit=True))
            return _mesh_modes.in_mode_of(mesh, out, specs)

        def _apply_attention(self, inputs, cache):
            if self.is_initializing():
                return super()._apply_attention(inputs, cache)
            return _run_blocks_on_mesh(self, inputs, cache)

    TensorParallel.__name__ = cls.__name__
    TensorParallel.__qualname__ = f"tensor_parallel({cls.__qualname__})"
    return TensorParallel


def _unpickle(cls: type, fields: dict[str, Any]) -> nn.Module:
    """Makes a tensor parallel model again, on devices of this process.

    Args:
      cls: the official class.
      fields: of the model; mesh as its devices' platforms and ids, its sizes and names.
    """
    devices, sizes, names = fields["mesh"]
    platforms = {platform for platform, _ in devices}
    found = {(d.platform, d.id): d for platform in platforms for d in jax.devices(platform)}
    if missing := [device for device in devices if device not in found]:
        raise ValueError(
            f"the model was pickled with the devices {devices}, of which this process lacks "
            f"{missing}; pickle the official model, and make it tensor parallel where it runs"
        )
    mesh = Mesh(np.array([found[device] for device in devices]).reshape(sizes), names)
    return _subclass(cls)(**fields | {"mesh": mesh})


def _copies(model, kv_heads: int) -> int:
    """How many ranks hold one and the same KV head."""
    return max(1, group_size(model.mesh, model.tp_axes) // kv_heads)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One block's official modules at this rank's sizes; their outputs are partial sums.

    experts: the routed experts of a block that has them beside its mlp. per_layer: the whole gate
    and projection of its per-layer input, if it has one. kv_source: the layer whose
    keys and values this one uses, or None. mask: the name of its attention mask in the inputs.
    """

    attention: nn.Module
    mlp: nn.Module
    experts: nn.Module | None
    per_layer: tuple[nn.Module, nn.Module] | None
    kv_source: str | None
    mask: str


class _SeparateKv(_gemma3_modules.Attention):
    """Gemma 3 attention with fewer KV heads than heads, although a rank may have one of each."""

    # A property of the base, which compares the two numbers.
    use_qkv_einsum: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]


def _layers(model) -> list[_Layer]:
    """From the blocks that model's setup made."""
    size = group_size(model.mesh, model.tp_axes)

    def local(module, *names):
        fields = _fields(module)
        cls = type(module) if getattr(module, "use_qkv_einsum", True) else _SeparateKv
        fields |= {name: max(1, fields[name] // size) for name in names}
        return cls(**fields, parent=None)

    layers = []
    for i, block in enumerate(model.blocks):
        attention = local(block.attn, "num_heads", "num_kv_heads")
        moe = getattr(block, "enable_moe", False)
        mlp = block.mlp2 if moe else block.mlp
        sharing = getattr(model, "kv_cache_sharing_patterns", range(len(model.blocks)))
        sliding = block.attn_type.name == "LOCAL_SLIDING"
        layers.append(
            _Layer(
                attention=attention,
                mlp=local(mlp, "hidden_dim"),
                experts=local(block.mlp, "hidden_dim") if moe else None,
                per_layer=(local(block.per_layer_input_gate), local(block.per_layer_projection))
                if getattr(block, "per_layer_input_dim", 0)
                else None,
                kv_source=None if sharing[i] == i else f"layer_{sharing[i]}",
                mask="sliding_attention_mask" if sliding else "attention_mask",
            )
        )
    return layers


def _vocabulary_parallel(model, method, args, kwargs, context):
    """Runs the embedder's lookups and logits on the rows of the table that each rank holds."""
    embedder, name = context.module, context.method_name
    if model.is_initializing() or not isinstance(embedder, _EMBEDDERS):
        return method(*args, **kwargs)
    if name == "encode":
        table = embedder.input_embedding_table
        (tokens,) = args
        x = _lookup_on_mesh(model, ("embedder", "input_embedding"), table, tokens)
        return x * jnp.sqrt(embedder.embed_dim).astype(x.dtype)
    if name == "decode":
        (x,) = args
        return _logits_on_mesh(model, embedder.input_embedding_table, x)
    if name == "encode_per_layer_input":
        return _per_layer_input(model, embedder, method, *args, **kwargs)
    return method(*args, **kwargs)


def _per_layer_input(model, embedder, method, x, tokens, ignore_ple_tokens=False):
    """Computes the inputs of each layer of E2B and E4B, from x and from a table."""
    projected = method(_at_least_two_rows(x), tokens, ignore_ple_tokens=True)[: len(x)]
    if ignore_ple_tokens:
        return projected
    tokens = jnp.where((tokens >= 0) & (tokens < embedder.vocab_size), tokens, 0)
    table = embedder.per_layer_input_embedding_table
    rows = _lookup_on_mesh(model, ("embedder", "per_layer_embeddings"), table, tokens)
    rows *= jnp.sqrt(embedder.per_layer_input_dim).astype(rows.dtype)
    return (projected + rows) * jax.lax.rsqrt(2.0).astype(projected.dtype)


def _lookup_on_mesh(model, path, table, tokens):
    """Returns the rows of the table at path for tokens, as ``table[tokens]``."""
    spec = model.param_spec(path, table.shape)
    find = functools.partial(lookup, axis_name=model.tp_axes) if spec else lambda t, ids: t[ids]
    batch = model.batch_spec(tokens.shape[0])
    return jax.shard_map(find, mesh=model.mesh, in_specs=(spec, batch), out_specs=batch)(
        table, tokens
    )


def _logits_on_mesh(model, table, x):
    """Returns logits, [..., V], split over the vocabulary."""
    spec = model.param_spec(("embedder", "input_embedding"), table.shape)
    batch = model.batch_spec(x.shape[0])

    def logits(table, x):
        return jnp.dot(_at_least_two_rows(x), table.T)[: len(x)]

    return jax.shard_map(
        logits,
        mesh=model.mesh,
        in_specs=(spec, batch),
        out_specs=P(*batch, *(None,) * (x.ndim - 1 - len(batch)), *(spec or (None,))),
    )(table, x)


def _run_blocks_on_mesh(model, inputs, cache):
    """Blocks and final norm: what _apply_attention returns, from the inputs that it takes."""
    params = model.variables["params"]
    names = [*(f"layer_{i}" for i in range(model.config.num_layers)), "final_norm"]
    if missing := [name for name in names if name not in params]:
        raise ValueError(
            f"the parameters must hold the {model.config.num_layers} layers of the model and "
            f"final_norm, got none for {', '.join(missing)}; is the checkpoint of another model?"
        )
    params = {name: params[name] for name in names}
    _check_cache(model, cache)
    batch = model.batch_spec(inputs.embeddings.shape[0])
    cache_specs = model.cache_specs(cache)
    in_specs = (
        jax.tree.map_with_path(lambda path, a: model.param_spec(_keys(path), a.shape), params),
        jax.tree.map(lambda _: batch, inputs),
        cache_specs,
    )
    (scale_offset,) = (n for base, n in _SCALE_OFFSET.items() if isinstance(model, base))
    run = functools.partial(
        _run_blocks,
        layers=_layers(model),
        axis_name=model.tp_axes,
        scale_offset=scale_offset,
        implementation=model.implementation,
    )
    return jax.shard_map(run, mesh=model.mesh, in_specs=in_specs, out_specs=(batch, cache_specs))(
        params, inputs, cache
    )


def _run_blocks(params, inputs, cache, *, layers: list[_Layer], axis_name, **tail):
    """On one rank. Each block hands the next one its output, and that output normed for it."""
    tail["axis_name"] = axis_name
    old_cache, new_cache = cache or {}, {}
    next_scales = [params[f"layer_{i}"]["pre_attention_norm"]["scale"] for i in range(len(layers))]
    next_scales.append(params["final_norm"]["scale"])
    batch, tokens = inputs.positions.shape
    h, per_layer_inputs = inputs.embeddings, getattr(inputs, "per_layer_inputs", None)
    if batch * tokens == 1 and cache is not None:
        # XLA makes a reduction of a matmul with one row, which is slower on GPUs than its matmul
        # with two. Both rows are equal, and stay so.
        h, per_layer_inputs = _two_rows((h, per_layer_inputs))
    # Else XLA would undo the repetition, and compute the inputs of each layer in that layer.
    h, per_layer_inputs = jax.lax.optimization_barrier((h, per_layer_inputs))
    normed = rmsnorm(h, next_scales[0], scale_offset=tail["scale_offset"])
    one = opaque_one(next_scales[-1])
    for i, layer in enumerate(layers):
        name = f"layer_{i}"
        p = params[name]
        mask = getattr(inputs, layer.mask, None)
        if mask is None:
            mask = inputs.attention_mask
        attention, layer_cache = layer.attention, old_cache.get(name)
        shared = None if layer.kv_source is None else new_cache[layer.kv_source]
        weights = _own_kv_heads(p["attn"], attention.num_kv_heads, axis_name)
        if tokens == 1 and layer_cache is not None and _is_plain(weights):
            layer_cache, attended = decode_attention(
                attention, weights, normed, inputs.positions, layer_cache, mask, shared, one
            )
        else:
            layer_cache, attended = attention.apply(
                {"params": weights},
                normed[:batch],
                inputs.positions,
                layer_cache,
                mask,
                **({} if shared is None else {"kv_shared_cache": shared}),
            )
            if len(normed) > batch:
                attended = _two_rows(attended)
        new_cache[name] = layer_cache
        feed_forward = _dense_half if layer.experts is None else _moe_half
        per_layer_input = None if per_layer_inputs is None else per_layer_inputs[..., i, :]
        h, normed = feed_forward(
            layer, p, attended, h, batch, per_layer_input, next_scales[i + 1], tail
        )
    return normed[:batch], None if cache is None else new_cache


def _is_plain(attention) -> bool:
    """Returns whether the parameters of an attention module are its own, not a wrapper's."""
    einsums = (params for name, params in attention.items() if name.endswith("_einsum"))
    return all(params.keys() == {"w"} for params in einsums)


def _two_rows(tree):
    """Repeats arrays with one row along their first axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape[1:])), tree)


def _at_least_two_rows(x):
    """Repeats the row of an array [..., D] that has one, for the reason given in _run_blocks."""
    return _two_rows(x) if x.size == x.shape[-1] else x


def _dense_half(layer, p, attended, h, batch, per_layer_input, next_scale, tail):
    """A block from its attention's partial sums on: (output, output normed by next_scale)."""
    h, normed = fused_sandwich(
        attended,
        h,
        p["post_attention_norm"]["scale"],
        next_norm_scale=p["pre_ffw_norm"]["scale"],
        **tail,
    )
    partial_sums = _feed_forward(layer.mlp, p["mlp"], normed, batch)
    norm_scale, layer_scalar = p["post_ffw_norm"]["scale"], p.get("skip_scale")
    if per_layer_input is None:
        return fused_sandwich(
            partial_sums, h, norm_scale, layer_scalar, next_norm_scale=next_scale, **tail
        )
    h = fused_post_ff(partial_sums, h, norm_scale, **tail)
    gate, projection = layer.per_layer
    gated = gate.apply({"params": p["per_layer_input_gate"]}, "...D,DP->...P", h)
    gated = nn.gelu(gated) * per_layer_input
    # Else XLA would compute the gelu again in every tile of the next matmul.
    gated = jax.lax.optimization_barrier(gated)
    update = projection.apply({"params": p["per_layer_projection"]}, "...P,PD->...D", gated)
    h = (h + rmsnorm(update, p["post_per_layer_input_norm"]["scale"])) * layer_scalar
    return h, rmsnorm(h, next_scale)


def _feed_forward(mlp, params, normed, batch):
    """This rank's partial sums of a dense feed-forward."""
    plain = params.keys() == {"gating_einsum", "linear"}  # not a wrapper's
    if len(normed) > batch and plain and getattr(mlp, "transpose_gating_einsum", True):
        return decode_feed_forward(normed, **params)
    return mlp.apply({"params": params}, normed)


def _moe_half(layer, p, attended, h, batch, per_layer_input, next_scale, tail):
    """Runs like _dense_half, with a dense branch, mlp2, and an expert branch, mlp."""
    del per_layer_input  # no model has both
    h, (normed, experts_normed) = fused_sandwich(
        attended,
        h,
        p["post_attention_norm"]["scale"],
        next_norm_scale=(p["pre_ffw2_norm"]["scale"], p["pre_ffw_norm"]["scale"]),
        **tail,
    )
    # Newer releases of the package route by the stream, not by its norm.
    takes_stream = "unnormalized_x" in inspect.signature(type(layer.experts).__call__).parameters
    router_input = {"unnormalized_x": h} if takes_stream else {}
    with nn.intercept_methods(functools.partial(run_experts, batch)):
        experts = layer.experts.apply({"params": p["mlp"]}, experts_normed, **router_input)
    return fused_moe_tail(
        _feed_forward(layer.mlp, p["mlp2"], normed, batch),
        experts,
        h,
        p["skip_scale"],
        dense_norm_scale=p["post_ffw2_norm"]["scale"],
        expert_norm_scale=p["post_ffw1_norm"]["scale"],
        norm_scale=p["post_ffw_norm"]["scale"],
        next_norm_scale=next_scale,
        **tail,
    )


def _own_kv_heads(attn, local_heads: int, axis_name):
    """The KV projections of this rank, also where several ranks share a head.

    Those are replicated, and rank r's query heads attend to KV head r * kv_heads // ranks.
    """

    def own(path, w):
        keys = _keys(path)
        axis = _SHARDED_AXIS.get(("attn", *keys))
        if axis is None or keys[0] not in _KV_PROJECTIONS or w.shape[axis] in (1, local_heads):
            return w
        head = jax.lax.axis_index(axis_name) * w.shape[axis] // jax.lax.axis_size(axis_name)
        return jax.lax.dynamic_slice_in_dim(w, head, 1, axis)

    return jax.tree.map_with_path(own, attn)


def _check_placement(model, params) -> None:
    """Arrays that lie otherwise would be moved at every call."""

    def check(path, leaf):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
            return
        expected = NamedSharding(model.mesh, model.param_spec(_keys(path), leaf.shape))
        if not leaf.sharding.is_equivalent_to(expected, leaf.ndim):
            raise ValueError(
                f"parameter {'/'.join(_keys(path))} must lie as {expected}, got {leaf.sharding}; "
                "place them once with jax.device_put(params, param_shardings(model))"
            )

    jax.tree.map_with_path(check, params)


def _check_cache(model, cache) -> None:
    size = group_size(model.mesh, model.tp_axes)
    for name, layer in (cache or {}).items():
        if (heads := layer["k"].shape[2]) % size:
            raise ValueError(
                f"{name} of the cache has {heads} KV heads, which {size} ranks do not divide; "
                "make the cache with init_cache of the tensor parallel model"
            )
