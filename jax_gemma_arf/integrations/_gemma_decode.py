"""A decode step of google-deepmind/gemma's blocks, written for the kernels that XLA makes of it.

The official modules compute the same and stay the definition (tests/test_gemma_parity.py). Compiled
for GPUs, a step of theirs has about twice as many kernels: each head projection is normed, rotated
and checked against the cache's bounds by itself, and the softmax of grouped queries runs over an
axis that is not the last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from gemma.gm.math import _positional_embeddings
from gemma.gm.nn.gemma4 import _modules as _gemma4_modules
from jax.experimental.layout import Layout, with_layout_constraint

from jax_gemma_arf._src.reference import rmsnorm

_MASKED = -2.3819763e38  # of the official modules, for logits

Cache = dict[str, jax.Array]


def attend(
    attention: Any,
    params: Any,
    x: jax.Array,
    positions: jax.Array,
    cache: Cache,
    mask: jax.Array,
    shared: Cache | None,
    one: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Computes one decode step of an official attention module.

    Args:
      attention: the module, of Gemma 2, 3 or 4, at this rank's numbers of heads.
      params: its parameters.
      x: [B, 1, D], the normed input; or [2, 1, D] with the row of a batch of one twice.
      positions: [B, 1].
      cache: this layer's cache.
      mask: [B, 1, S], which cached tokens may be attended to.
      shared: the updated cache of the layer whose keys and values this one uses, or None.
      one: 1, from :func:`opaque_one`, the same array for all layers.

    Returns:
      The updated cache, and this rank's partial sums of the output, with as many rows as x. With
      shared, only the length in the cache changes: nothing reads this layer's own keys and values.
      The official module returns the shared keys and values as this layer's, which copies them in
      every step of a loop.
    """
    batch = len(positions)
    gemma4 = isinstance(attention, _gemma4_modules.Attention)
    project = _project_gemma4 if gemma4 else _project_gemma3
    query, key, value = project(attention, params, x, positions, shared is not None)
    kv = shared
    if kv is None:
        write = _write_rows if gemma4 else _write_slice
        new = {"k": key, "v": value, "positions": positions}
        kv = {name: write(cache[name], array, cache["end_index"]) for name, array in new.items()}
        cache = cache | kv
    if attention.attn_type.name == "LOCAL_SLIDING":
        distance = kv["positions"][:, None, :] - positions[:, :, None]
        mask &= jnp.abs(distance) < attention.sliding_window_size
    query = query.reshape(batch, attention.num_kv_heads, -1, query.shape[-1])
    logits = jnp.einsum("BKGH,BSKH->BKGS", query, kv["k"])
    if cap := attention.attn_logits_soft_cap:
        logits = jnp.tanh(logits / cap) * cap
    probs = jax.nn.softmax(jnp.where(mask[:, None], logits, _MASKED)).astype(kv["k"].dtype)
    encoded = jnp.einsum("BKGS,BSKH->BKGH", probs, kv["v"])
    encoded = encoded.reshape(batch, 1, -1, encoded.shape[-1])
    encoded = jnp.broadcast_to(encoded, (len(x), *encoded.shape[1:]))
    out = jnp.einsum("BTNH,NHD->BTD", encoded, params["attn_vec_einsum"]["w"])
    return cache | {"end_index": cache["end_index"] + one}, out


def feed_forward(x: jax.Array, gating_einsum: jax.Array, linear: jax.Array) -> jax.Array:
    """Computes the official feed-forward of one token.

    Args:
      x: [2, 1, D], the normed input, twice.
      gating_einsum: [2, H, D], gate and up projection at this rank's number of hidden units.
      linear: [H, D], down-projection.

    Returns:
      [2, 1, D], this rank's partial sums of the output.
    """
    # Written as a sum, which reads the weight at the full memory bandwidth; a matmul does not.
    products = x[0].astype(jnp.float32) * gating_einsum.astype(jnp.float32)
    gate, up = jnp.sum(products, axis=-1).astype(x.dtype)
    activations = jnp.broadcast_to(nn.gelu(gate) * up, (len(x), 1, len(up)))
    return jnp.einsum("BTH,HD->BTD", activations, linear)


def opaque_one(array: jax.Array) -> jax.Array:
    """Returns 1, computed from an array of several elements, for the lengths of all caches.

    In every step each layer adds one to the length of its cache. XLA fuses kernels that have an
    operand in common, but neither a constant nor a scalar counts. The array does, so all additions
    become one kernel.
    """
    return (array[0] > 0).astype(jnp.int32) | 1


def _project_gemma4(attention, params, x, positions, query_only):
    """Returns query, key and value, [B, 1, heads, H] each: all normed, the first two rotated."""
    batch = len(positions)
    query = _project_heads(x, params["q_einsum"]["w"])[:batch]
    if query_only:
        query = _norm_heads([query], [_scale(params, "query_norm", query)])
        return _rotate(attention, query, positions), None, None
    if attention.k_eq_v:
        key = value = _project_heads(x, params["k_einsum"]["w"])[:batch]
    else:
        key, value = jnp.split(_project_heads(x, params["kv_einsum"]["w"])[:batch], 2, axis=2)
    scales = [_scale(params, name, query) for name in ("query_norm", "key_norm", "value_norm")]
    heads = _norm_heads([query, key, value], scales)
    rotated, value = jnp.split(heads, [query.shape[2] + key.shape[2]], axis=2)
    query, key = jnp.split(_rotate(attention, rotated, positions), [query.shape[2]], axis=2)
    return query, key, value


def _project_gemma3(attention, params, x, positions, query_only):
    """Does the same for Gemma 2 and 3, which norm no values, and queries and keys where set so."""
    del query_only  # no layer shares keys and values
    batch = len(positions)
    if attention.use_qkv_einsum:
        heads = _project_heads(x, params["qkv_einsum"]["w"])[:batch]
        query, key, value = jnp.split(heads, 3, axis=2)
    else:
        query = _project_heads(x, params["q_einsum"]["w"])[:batch]
        key, value = jnp.split(_project_heads(x, params["kv_einsum"]["w"])[:batch], 2, axis=2)
    if attention.use_qk_norm:
        scales = [1 + _scale(params, name, query) for name in ("_query_norm", "_key_norm")]
        heads = _norm_heads([query, key], scales)
    else:
        heads = jnp.concatenate([query, key], axis=2)
    query, key = jnp.split(_rotate(attention, heads, positions), [query.shape[2]], axis=2)
    return query * attention.query_pre_attn_scalar, key, value


def _project_heads(x: jax.Array, w: jax.Array) -> jax.Array:
    """Projects x, [B, T, D], to heads, [B, T, N, H], by w, [..., D, H], of N heads altogether.

    As one matmul of all heads, XLA of jaxlib 0.12 would first bring D to the front of w: in memory,
    in every step. So this is a batch of one matmul for each head. Its result gets the default
    layout, since the norms of two tokens or more would otherwise run over an axis that is not the
    minor one.
    """
    w = w.reshape(-1, *w.shape[-2:])
    heads = jnp.einsum("NBTD,NDH->BTNH", jnp.broadcast_to(x, (len(w), *x.shape)), w)
    return with_layout_constraint(heads, Layout(major_to_minor=(0, 1, 2, 3)))


def _scale(params, name: str, like: jax.Array) -> jax.Array:
    """Returns the scale of a norm over heads, [H] in float32; ones where it has none."""
    if name in params:
        return params[name]["scale"].astype(jnp.float32)
    return jnp.ones(like.shape[-1], jnp.float32)


def _norm_heads(heads: list[jax.Array], scales: list[jax.Array]) -> jax.Array:
    """Norms several arrays [B, 1, heads, H], each with its own scale, as one array."""
    together = jnp.concatenate(heads, axis=2)
    index = jnp.arange(together.shape[2])[:, None]
    scale, first = scales[0], 0
    for array, following in zip(heads, scales[1:]):
        first += array.shape[2]
        scale = jnp.where(index >= first, following, scale)
    scale = jnp.broadcast_to(scale, together.shape[2:])
    return jax.vmap(rmsnorm, in_axes=(2, 0), out_axes=2)(together, scale)


def _rotate(attention, heads: jax.Array, positions: jax.Array) -> jax.Array:
    options = {
        "base_frequency": attention.rope_base_frequency,
        "scale_factor": attention.rope_scale_factor,
    }
    if (proportion := getattr(attention, "rope_proportion", None)) is not None:
        options["rope_proportion"] = proportion
    return _positional_embeddings.apply_rope(heads, positions, **options)


def _write_rows(cache: jax.Array, new: jax.Array, end_index: jax.Array) -> jax.Array:
    """Writes new, [B, 1, ...], into the cache, [B, S, ...], for each sequence at its own end."""
    if len(new) == 1:  # XLA would read the row first, to check the bounds of a scatter
        return _write_slice(cache, new, end_index)
    index = end_index % cache.shape[1]
    return cache.at[jnp.arange(len(new)), index].set(
        new[:, 0], mode="promise_in_bounds", unique_indices=True
    )


def _write_slice(cache: jax.Array, new: jax.Array, end_index: jax.Array) -> jax.Array:
    """Writes new for all sequences at the end of the first, as Gemma 2 and 3 do."""
    start = (0, end_index[0] % cache.shape[1], *(0,) * (cache.ndim - 2))
    return jax.lax.dynamic_update_slice(cache, new, start)
