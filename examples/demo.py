"""Decodes with a stack of Gemma 4 shaped blocks, tensor parallel over the devices there are.

Every block calls fused_post_ff twice, on the partial sums of its out-projection and of its
down-projection. Two models show the four kinds of call: in "31B" the second one applies the layer
scalar; in "E2B" the scalar waits until after the per-layer-input branch. Each is compared with an
unsharded float64 NumPy computation, and timed against implementation="xla", which is psum.

Weights are random, and left out are the embeddings, rotary positions, sliding windows, the wider
heads of global layers, and shared KV caches. Decoding starts from an empty KV cache.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_gemma_arf import fused_post_ff, fusion_support
from jax_gemma_arf.support import AXIS_SIZES

BATCH = 4
REPEATS = 7
# bfloat16 rounds by up to 2**-9, and a block rounds about ten times on the way to its output:
# 8 layers of independent roundings add up to sqrt(80) * 2**-9 = 2e-2 of a typical element. Adding
# the residual before the norm instead of after it is off by about 1.
BOUND = 3e-2
CACHE_SPEC = P(None, None, None, "tp")

Params = dict[str, jax.Array]
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model. per_layer_width is that of the per-layer inputs, 0 for a model without them."""

    name: str
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int = 256
    per_layer_width: int = 0
    layers: int = 8
    steps: int = 16

    def cut_down(self) -> "Sizes":
        """The same hidden size, and little else, for a CPU."""
        return dataclasses.replace(
            self, ff=1024, head_dim=32, per_layer_width=self.per_layer_width // 4, layers=3, steps=8
        )


MODELS = (
    Sizes("31B", hidden=5376, ff=21504, heads=32, kv_heads=16),
    # E2B has one KV head; tensor parallelism gives every rank a copy.
    Sizes("E2B", hidden=1536, ff=6144, heads=8, kv_heads=8, per_layer_width=256),
)


def param_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's parameters."""
    hidden, ff, width = sizes.hidden, sizes.ff, sizes.per_layer_width
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    shapes = {
        "pre_attention_norm": (hidden,),
        "w_q": (hidden, q),
        "w_k": (hidden, kv),
        "w_v": (hidden, kv),
        "q_norm": (sizes.head_dim,),
        "k_norm": (sizes.head_dim,),
        "w_out": (q, hidden),
        "post_attention_norm": (hidden,),
        "pre_ff_norm": (hidden,),
        "w_gate": (hidden, ff),
        "w_up": (hidden, ff),
        "w_down": (ff, hidden),
        "post_ff_norm": (hidden,),
        "layer_scalar": (1,),
    }
    if width:
        per_layer = {"gate": (hidden, width), "proj": (width, hidden), "norm": (hidden,)}
        shapes |= {f"per_layer_{name}": shape for name, shape in per_layer.items()}
    return shapes


def param_specs(sizes: Sizes) -> dict[str, P]:
    """Column-parallel into heads and FF, row-parallel out of them, everything else replicated."""
    column = dict.fromkeys(("w_q", "w_k", "w_v", "w_gate", "w_up"), P(None, None, "tp"))
    row = dict.fromkeys(("w_out", "w_down"), P(None, "tp", None))
    return {name: (column | row).get(name, P()) for name in param_shapes(sizes)}


def init_params(key: jax.Array, sizes: Sizes) -> Params:
    """Random bfloat16 weights, stacked: [layers, *shape]."""
    # Gemma 4 does not divide attention scores by sqrt(head_dim): q_norm has learnt to.
    centres = {"q_norm": sizes.head_dim**-0.5, "layer_scalar": 0.75}
    params = {}
    for name, shape in param_shapes(sizes).items():
        key, subkey = jax.random.split(key)
        noise = jax.random.normal(subkey, (sizes.layers, *shape), jnp.bfloat16)
        is_matrix = len(shape) == 2
        params[name] = (
            noise * shape[0] ** -0.5 if is_matrix else centres.get(name, 1.0) * (1 + noise / 8)
        )
    return params


def init_inputs(key: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array | None]:
    """Embeddings [steps, B, D] and per-layer inputs [steps, layers, B, W] or None."""
    keys = jax.random.split(key)
    shapes = (
        (sizes.steps, BATCH, sizes.hidden),
        (sizes.steps, sizes.layers, BATCH, sizes.per_layer_width),
    )
    inputs, per_layer = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes))
    return inputs, per_layer if sizes.per_layer_width else None


def init_cache(sizes: Sizes) -> Cache:
    """Room for all steps: [layers, B, steps, KV heads, head_dim]."""
    shape = (sizes.layers, BATCH, sizes.steps, sizes.kv_heads, sizes.head_dim)
    return {"k": jnp.zeros(shape, jnp.bfloat16), "v": jnp.zeros(shape, jnp.bfloat16)}


def rmsnorm(x: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
    """RMSNorm over the last axis in float32; x.dtype."""
    row = x.astype(jnp.float32)
    row = row * jax.lax.rsqrt(jnp.mean(row * row, axis=-1, keepdims=True) + 1e-6)
    return (row * scale).astype(x.dtype)


def attention(x: jax.Array, p: Params, cache: Cache, step: jax.Array) -> tuple[jax.Array, Cache]:
    """Grouped-query attention of this rank's heads, before the out-projection.

    Args:
      x: [B, D], normed.
      p: one layer's parameters.
      cache: {"k", "v"}: [B, steps, KV heads of this rank, head_dim].
      step: (), where this token goes in the cache.

    Returns:
      [B, heads of this rank * head_dim], and the cache with this token.
    """
    batch, length, kv_heads, head_dim = cache["k"].shape
    q, k, v = ((x @ p[name]).reshape(batch, -1, head_dim) for name in ("w_q", "w_k", "w_v"))
    q = rmsnorm(q, p["q_norm"]).reshape(batch, kv_heads, -1, head_dim)
    new = {"k": rmsnorm(k, p["k_norm"]), "v": rmsnorm(v)}
    cache = {name: cache[name].at[:, step].set(new[name]) for name in cache}
    scores = jnp.einsum("bgqd,btgd->bgqt", q, cache["k"], preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(length) <= step, scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(x.dtype)
    return jnp.einsum("bgqt,btgd->bgqd", weights, cache["v"]).reshape(batch, -1), cache


def block(
    h: jax.Array,
    p: Params,
    cache: Cache,
    per_layer_input: jax.Array | None,
    step: jax.Array,
    post_ff: Callable[..., jax.Array],
) -> tuple[jax.Array, Cache]:
    """One block on one rank. h: [B, D], replicated; per_layer_input: [B, W]; as attention."""
    attended, cache = attention(rmsnorm(h, p["pre_attention_norm"]), p, cache, step)
    h = post_ff(attended @ p["w_out"], h, p["post_attention_norm"])

    normed = rmsnorm(h, p["pre_ff_norm"])
    partial_sums = (jax.nn.gelu(normed @ p["w_gate"]) * (normed @ p["w_up"])) @ p["w_down"]
    if per_layer_input is None:
        return post_ff(partial_sums, h, p["post_ff_norm"], p["layer_scalar"]), cache
    h = post_ff(partial_sums, h, p["post_ff_norm"])
    gated = jax.nn.gelu(h @ p["per_layer_gate"]) * per_layer_input
    h = h + rmsnorm(gated @ p["per_layer_proj"], p["per_layer_norm"])
    return h * p["layer_scalar"], cache


def make_decode(sizes: Sizes, mesh: jax.sharding.Mesh, implementation: str | None) -> Callable:
    """The jitted (params, cache, inputs, per-layer inputs) -> outputs [steps, B, D]."""
    post_ff = partial(fused_post_ff, axis_name="tp", implementation=implementation)

    def decode(params, cache, inputs, per_layer_inputs):
        def one_step(cache, xs):
            step, h, per_layer_input = xs
            h, cache = jax.lax.scan(
                lambda h, layer: block(h, *layer, step, post_ff), h, (params, cache, per_layer_input)
            )
            return cache, h

        xs = (jnp.arange(sizes.steps), inputs, per_layer_inputs)
        return jax.lax.scan(one_step, cache, xs)[1]

    in_specs = (param_specs(sizes), CACHE_SPEC, P(), P())
    return jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=in_specs, out_specs=P()))


def reference_decode(params: Params, inputs, per_layer_inputs, sizes: Sizes) -> np.ndarray:
    """The same stack in float64 on unsharded weights: [steps, B, D].

    Layer by layer with a causal mask, all steps at once, so that it shares no cache logic either.
    """

    def norm(x, scale=1.0):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def float64(x):
        return np.asarray(x).astype(np.float64)

    causal = np.tri(sizes.steps, dtype=bool)
    group = sizes.heads // sizes.kv_heads
    h = float64(inputs)
    for layer in range(sizes.layers):
        p = {name: float64(stacked[layer]) for name, stacked in params.items()}
        x = norm(h, p["pre_attention_norm"])
        q, k, v = (
            (x @ p[name]).reshape(*x.shape[:2], -1, sizes.head_dim) for name in ("w_q", "w_k", "w_v")
        )
        q, k, v = norm(q, p["q_norm"]), norm(k, p["k_norm"]), norm(v)
        k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
        scores = np.where(causal, np.einsum("sbhd,tbhd->bhst", q, k), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("bhst,tbhd->sbhd", weights, v).reshape(*x.shape[:2], -1)
        h = h + norm(attended @ p["w_out"], p["post_attention_norm"])
        x = norm(h, p["pre_ff_norm"])
        h = h + norm((gelu(x @ p["w_gate"]) * (x @ p["w_up"])) @ p["w_down"], p["post_ff_norm"])
        if per_layer_inputs is not None:
            gated = gelu(h @ p["per_layer_gate"]) * float64(per_layer_inputs[:, layer])
            h = h + norm(gated @ p["per_layer_proj"], p["per_layer_norm"])
        h = h * p["layer_scalar"]
    return h


def median_seconds(functions: list[Callable], arguments: tuple) -> list[float]:
    """Median seconds a call, the functions in turn, so that drift of the machine hits all alike."""
    seconds = []
    for _ in range(REPEATS):
        for function in functions:
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[i :: len(functions)]) for i in range(len(functions))]


def argument_specs(sizes: Sizes) -> tuple:
    """PartitionSpecs of what make_decode's function takes."""
    return param_specs(sizes), CACHE_SPEC, P(), P()


def print_rows(sizes: Sizes, rank_counts: list[int]) -> tuple[bool, bool]:
    """A row for each number of ranks. Returns whether all were right, and whether any ran fused."""
    keys = jax.random.split(jax.random.key(0))
    params, inputs = init_params(keys[0], sizes), init_inputs(keys[1], sizes)
    reference = reference_decode(jax.device_get(params), *inputs, sizes)
    right, any_fused = True, False
    for ranks in rank_counts:
        mesh = jax.make_mesh((ranks,), ("tp",), devices=jax.devices()[:ranks])
        support = fusion_support((BATCH, sizes.hidden), jnp.bfloat16, mesh=mesh, axis_name="tp")
        shardings = jax.tree.map(partial(NamedSharding, mesh), argument_specs(sizes))
        arguments = jax.device_put((params, init_cache(sizes), *inputs), shardings)
        decodes = [make_decode(sizes, mesh, implementation) for implementation in (None, "xla")]
        outputs = [np.asarray(decode(*arguments)).astype(np.float64) for decode in decodes]
        difference = np.abs(np.stack(outputs) - reference).max()
        relative = difference / np.abs(reference).max()
        microseconds = [
            1e6 * seconds / (sizes.steps * sizes.layers)
            for seconds in median_seconds(decodes, arguments)
        ]
        print(
            f"{sizes.name:5} {ranks:5}  {difference:10.4f} {relative:10.1e}"
            f"  {microseconds[0]:8.0f} {microseconds[1]:8.0f}  {support.reason}"
        )
        right &= bool(relative <= BOUND)
        any_fused |= support.ok
    return right, any_fused


def main() -> None:
    """Prints the table; exits with 1 if a difference is above BOUND."""
    jax.config.update("jax_num_cpu_devices", 4)
    devices = jax.devices()
    models = MODELS
    if devices[0].platform == "cpu":
        models = tuple(sizes.cut_down() for sizes in MODELS)
    rank_counts = [ranks for ranks in AXIS_SIZES if ranks <= len(devices)] or [1]
    print(f"{len(devices)} x {devices[0].device_kind}, bfloat16, batch {BATCH}")
    for sizes in models:
        print(
            f"  {sizes.name}: D = {sizes.hidden}, FF {sizes.ff}, {sizes.heads} heads and "
            f"{sizes.kv_heads} KV heads of {sizes.head_dim}; "
            f"{sizes.steps} decode steps through {sizes.layers} layers"
        )
    print(f"\n{'':11}  {'off float64 by at most':>21}  {'us per layer':>17}")
    print(f"model ranks  {'absolute':>10} {'relative':>10}  {'fused':>8} {'psum':>8}  decision")
    right, fused = map(any, zip(*[print_rows(sizes, rank_counts) for sizes in models]))
    sys.exit(0)


if __name__ == "__main__":
    main()
