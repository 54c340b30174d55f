"""Decode attention of google-deepmind/gemma, written for the kernels that XLA makes of it.

The official modules compute the same and stay the definition (tests/test_gemma_parity.py). Compiled
for GPUs, a step of theirs has about twice as many kernels: each head projection is normed, rotated
and checked against the cache's bounds by itself, and the softmax of grouped queries runs over an
axis that is not the last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from gemma.gm.math import _positional_embeddings
from gemma.gm.nn.gemma4 import _modules as _gemma4_modules

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
    return cache | {"end_index": cache["end_index"] + 1}, out


def _project_gemma4(attention, params, x, positions, query_only):
    """Returns query, key and value, [B, 1, heads, H] each: all normed, the first two rotated."""
    batch = len(positions)
    w = params["q_einsum"]["w"]
    if query_only:
        # Without keys and values to merge this matmul with, XLA would transpose its weight in
        # memory in every step, unless it is a batch of one matmul for each head.
        query = jnp.einsum("NBTD,NDH->BTNH", jnp.broadcast_to(x, (len(w), *x.shape)), w)[:batch]
        query = _norm_heads([query], [_scale(params, "query_norm", w)])
        return _rotate(attention, query, positions), None, None
    query = jnp.einsum("BTD,NDH->BTNH", x, w)[:batch]
    if attention.k_eq_v:
        key = value = jnp.einsum("BTD,KDH->BTKH", x, params["k_einsum"]["w"])[:batch]
    else:
        key, value = jnp.einsum("BTD,CKDH->CBTKH", x, params["kv_einsum"]["w"])[:, :batch]
    scales = [_scale(params, name, w) for name in ("query_norm", "key_norm", "value_norm")]
    heads = _norm_heads([query, key, value], scales)
    rotated, value = jnp.split(heads, [query.shape[2] + key.shape[2]], axis=2)
    query, key = jnp.split(_rotate(attention, rotated, positions), [query.shape[2]], axis=2)
    return query, key, value


def _project_gemma3(attention, params, x, positions, query_only):
    """Does the same for Gemma 2 and 3, which norm no values, and queries and keys where set so."""
    del query_only  # no layer shares keys and values
    batch = len(positions)
    if attention.use_qkv_einsum:
        query, key, value = jnp.einsum("BTD,SNDH->SBTNH", x, params["qkv_einsum"]["w"])[:, :batch]
    else:
        query = jnp.einsum("BTD,NDH->BTNH", x, params["q_einsum"]["w"])[:batch]
        key, value = jnp.einsum("BTD,CKDH->CBTKH", x, params["kv_einsum"]["w"])[:, :batch]
    if attention.use_qk_norm:
        scales = [1 + _scale(params, name, query) for name in ("_query_norm", "_key_norm")]
        heads = _norm_heads([query, key], scales)
    else:
        heads = jnp.concatenate([query, key], axis=2)
    query, key = jnp.split(_rotate(attention, heads, positions), [query.shape[2]], axis=2)
    return query * attention.query_pre_attn_scalar, key, value


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
