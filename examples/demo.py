"""Decodes with a stack of Gemma 4 shaped blocks, tensor parallel over the devices there are.

A block ends each of its halves with fused_post_ff, on the partial sums of the out-projection and of
the down-projection. Two models show the four kinds of call: in "31B" the second one applies the
layer scalar; in "E2B" it does not, because the scalar comes after the per-layer-input branch. Both
are compared with unsharded float64 NumPy, and timed against implementation="xla", which is psum.

Weights are random. Left out: embeddings, rotary positions, sliding windows, the wider heads of
global layers, shared KV caches.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_gemma_arf import Support, fused_post_ff, fusion_support, rmsnorm

BATCH = 4
REPEATS = 5
# A bfloat16 rounding is off by up to 2**-9, a block has about ten, and the next passes them on.
# Three layers end up 1e-2 to 2e-2 off. Adding the residual before the norm would be 0.6 off.
BOUND = 5e-2

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model and a number of decode steps. per_layer_width: 0 if it has no per-layer inputs."""

    width: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int = 256
    per_layer_width: int = 0
    layers: int = 8
    steps: int = 16

    def __str__(self) -> str:
        heads = f"{self.heads} heads and {self.kv_heads} KV heads of {self.head_dim}"
        return f"D {self.width}, FF {self.ff}, {heads}, {self.layers} layers, {self.steps} steps"

    def cut_down(self) -> "Sizes":
        """The same D, and little else, for CPUs and for the float64 computation."""
        width = self.per_layer_width // 4
        return dataclasses.replace(
            self, ff=1024, head_dim=32, per_layer_width=width, layers=3, steps=8
        )


MODELS = {
    "31B": Sizes(width=5376, ff=21504, heads=32, kv_heads=16),
    # E2B has a single KV head, which cannot be sharded; here there is one for each head.
    "E2B": Sizes(width=1536, ff=6144, heads=8, kv_heads=8, per_layer_width=256),
}


def param_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's parameters."""
    width, ff, per_layer = sizes.width, sizes.ff, sizes.per_layer_width
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    shapes = {
        "pre_attention_norm": (width,),
        "w_q": (width, q),
        "w_k": (width, kv),
        "w_v": (width, kv),
        "q_norm": (sizes.head_dim,),
        "k_norm": (sizes.head_dim,),
        "w_out": (q, width),
        "post_attention_norm": (width,),
        "pre_ff_norm": (width,),
        "w_gate": (width, ff),
        "w_up": (width, ff),
        "w_down": (ff, width),
        "post_ff_norm": (width,),
        "layer_scalar": (1,),
    }
    branch = {"w_in": (width, per_layer), "w_out": (per_layer, width), "norm": (width,)}
    return shapes | {f"per_layer_{k}": shape for k, shape in branch.items() if per_layer}


def param_specs(sizes: Sizes) -> dict[str, P]:
    """Column-parallel into heads and FF, row-parallel out of them, everything else replicated."""
    column = dict.fromkeys(("w_q", "w_k", "w_v", "w_gate", "w_up"), P(None, None, "tp"))
    row = dict.fromkeys(("w_out", "w_down"), P(None, "tp", None))
    return dict.fromkeys(param_shapes(sizes), P()) | column | row


def argument_specs(sizes: Sizes) -> tuple:
    """PartitionSpecs of what init_arguments returns; the caches are sharded over KV heads."""
    return param_specs(sizes), P(None, None, None, "tp", None), P(), P()


def init_params(key: jax.Array, sizes: Sizes) -> Arrays:
    """Random bfloat16 parameters stacked over layers, [layers, *shape]."""
    # Gemma 4 does not divide attention scores by sqrt(head_dim); q_norm has learnt to.
    centres = {"q_norm": sizes.head_dim**-0.5, "layer_scalar": 0.75}
    params = {}
    for name, shape in param_shapes(sizes).items():
        key, subkey = jax.random.split(key)
        noise = jax.random.normal(subkey, (sizes.layers, *shape), jnp.bfloat16)
        if len(shape) == 2:
            params[name] = noise * shape[0] ** -0.5
        else:
            params[name] = centres.get(name, 1.0) * (1 + noise / 8)
    return params


def init_arguments(sizes: Sizes) -> tuple[Arrays, Arrays, jax.Array, jax.Array | None]:
    """Returns the inputs of decoding: (params, cache, inputs, per_layer_inputs), bfloat16.

    The cache is empty and {"k", "v"}: [layers, B, steps, KV heads, head_dim]; inputs [steps, B, D];
    per_layer_inputs [steps, layers, B, W], or None for a model without them.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    cache_shape = (sizes.layers, BATCH, sizes.steps, sizes.kv_heads, sizes.head_dim)
    cache = {name: jnp.zeros(cache_shape, jnp.bfloat16) for name in ("k", "v")}
    inputs = jax.random.normal(keys[1], (sizes.steps, BATCH, sizes.width), jnp.bfloat16)
    per_layer_inputs = None
    if width := sizes.per_layer_width:
        shape = (sizes.steps, sizes.layers, BATCH, width)
        per_layer_inputs = jax.random.normal(keys[2], shape, jnp.bfloat16)
    return init_params(keys[0], sizes), cache, inputs, per_layer_inputs


def attention(x: jax.Array, p: Arrays, cache: Arrays, step: jax.Array) -> tuple[jax.Array, Arrays]:
    """This rank's heads for one more token, [B, heads * head_dim], and the cache with that token.

    x: [B, D], normed; p: one layer's parameters; cache: {"k", "v"}: [B, steps, KV heads, head_dim].
    """
    batch, steps, kv_heads, head_dim = cache["k"].shape
    q, k, v = ((x @ p[name]).reshape(batch, -1, head_dim) for name in ("w_q", "w_k", "w_v"))
    q = rmsnorm(q, p["q_norm"]).reshape(batch, kv_heads, -1, head_dim)
    keys = cache["k"].at[:, step].set(rmsnorm(k, p["k_norm"]))
    values = cache["v"].at[:, step].set(rmsnorm(v, jnp.ones(head_dim)))
    scores = jnp.einsum("bgqd,btgd->bgqt", q, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.arange(steps) <= step, scores, -jnp.inf))
    attended = jnp.einsum("bgqt,btgd->bgqd", weights.astype(x.dtype), values)
    return attended.reshape(batch, -1), {"k": keys, "v": values}


def block(
    h: jax.Array,
    layer: tuple[Arrays, Arrays, jax.Array | None],
    *,
    step: jax.Array,
    post_ff: Callable[..., jax.Array],
) -> tuple[jax.Array, Arrays]:
    """One block on one rank, a body for jax.lax.scan: h [B, D] and this layer's cache.

    layer: parameters, cache, and per-layer input [B, W] or None. post_ff: fused_post_ff.
    """
    p, cache, per_layer_input = layer
    attended, cache = attention(rmsnorm(h, p["pre_attention_norm"]), p, cache, step)
    h = post_ff(attended @ p["w_out"], h, p["post_attention_norm"])

    x = rmsnorm(h, p["pre_ff_norm"])
    partial_sums = (jax.nn.gelu(x @ p["w_gate"]) * (x @ p["w_up"])) @ p["w_down"]
    if per_layer_input is None:
        return post_ff(partial_sums, h, p["post_ff_norm"], p["layer_scalar"]), cache

    h = post_ff(partial_sums, h, p["post_ff_norm"])
    gated = jax.nn.gelu(h @ p["per_layer_w_in"]) * per_layer_input
    h = h + rmsnorm(gated @ p["per_layer_w_out"], p["per_layer_norm"])
    return h * p["layer_scalar"], cache


def make_decode(
    sizes: Sizes, mesh: Mesh, implementation: Literal["xla"] | None
) -> Callable[..., jax.Array]:
    """The jitted function from init_arguments to outputs [steps, B, D]."""
    post_ff = functools.partial(fused_post_ff, axis_name="tp", implementation=implementation)

    def decode(params, cache, inputs, per_layer_inputs):
        def one_step(cache, xs):
            step, h, per_layer_input = xs
            body = functools.partial(block, step=step, post_ff=post_ff)
            h, cache = jax.lax.scan(body, h, (params, cache, per_layer_input))
            return cache, h

        xs = (jnp.arange(sizes.steps), inputs, per_layer_inputs)
        return jax.lax.scan(one_step, cache, xs)[1]

    specs = argument_specs(sizes)
    return jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=P()))


def load(sizes: Sizes, mesh: Mesh) -> tuple[list[Callable], tuple]:
    """The default implementation and "xla", and their arguments on the mesh."""
    decodes = [make_decode(sizes, mesh, implementation) for implementation in (None, "xla")]
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), argument_specs(sizes))
    return decodes, jax.device_put(init_arguments(sizes), shardings)


def float64_decode(sizes: Sizes) -> np.ndarray:
    """The outputs [steps, B, D] in float64 on unsharded weights.

    Layer by layer, all steps at once under a causal mask: it shares not even the idea of a cache.
    """

    def norm(x, scale=1.0):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def split_heads(x):
        return x.reshape(sizes.steps, BATCH, -1, sizes.head_dim)

    params, _, h, per_layer_inputs = jax.tree.map(
        lambda a: np.asarray(a).astype(np.float64), init_arguments(sizes)
    )
    causal = np.tri(sizes.steps, dtype=bool)
    group = sizes.heads // sizes.kv_heads
    for layer in range(sizes.layers):
        p = {name: stacked[layer] for name, stacked in params.items()}
        x = norm(h, p["pre_attention_norm"])
        q = norm(split_heads(x @ p["w_q"]), p["q_norm"])
        k = norm(split_heads(x @ p["w_k"]), p["k_norm"]).repeat(group, axis=2)
        v = norm(split_heads(x @ p["w_v"])).repeat(group, axis=2)
        weights = np.exp(np.where(causal, np.einsum("sbhd,tbhd->bhst", q, k), -np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("bhst,tbhd->sbhd", weights, v).reshape(sizes.steps, BATCH, -1)
        h = h + norm(attended @ p["w_out"], p["post_attention_norm"])
        x = norm(h, p["pre_ff_norm"])
        h = h + norm((gelu(x @ p["w_gate"]) * (x @ p["w_up"])) @ p["w_down"], p["post_ff_norm"])
        if per_layer_inputs is not None:
            gated = gelu(h @ p["per_layer_w_in"]) * per_layer_inputs[:, layer]
            h = h + norm(gated @ p["per_layer_w_out"], p["per_layer_norm"])
        h = h * p["layer_scalar"]
    return h


def median_seconds(functions: list[Callable], arguments: tuple) -> list[float]:
    """Median seconds a call of each, taking turns so that what drifts hits all of them alike."""
    seconds = []
    for _ in range(1 + REPEATS):
        for function in functions:
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds.append(time.perf_counter() - start)
    warm = seconds[len(functions) :]
    return [statistics.median(warm[i :: len(functions)]) for i in range(len(functions))]


def decision(sizes: Sizes, mesh: Mesh) -> Support:
    """The decision for both calls of a block: they differ only in the layer scalar."""
    return fusion_support((BATCH, sizes.width), jnp.bfloat16, mesh=mesh, axis_name="tp")


def print_row(name: str, checked: Sizes, timed: Sizes, mesh: Mesh, reference: np.ndarray) -> bool:
    """Compares and times on one mesh; False if either implementation is out of BOUND."""
    decodes, arguments = load(checked, mesh)
    outputs = np.stack([np.asarray(decode(*arguments)).astype(np.float64) for decode in decodes])
    difference = np.abs(outputs - reference).max()
    relative = difference / np.abs(reference).max()
    if timed != checked:
        decodes, arguments = load(timed, mesh)
    calls = timed.steps * timed.layers
    fused, psum = (1e6 * seconds / calls for seconds in median_seconds(decodes, arguments))
    print(
        f"{name:5} {mesh.size:5}  {difference:8.4f} {relative:9.1e}  {fused:8.1f} {psum:8.1f}  "
        + decision(timed, mesh).reason
    )
    return bool(relative <= BOUND)


def main() -> None:
    """Prints the table; exits with an error if a difference is out of bounds."""
    jax.config.update("jax_num_cpu_devices", 4)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    counts = [count for count in (2, 4, 8) if count <= len(devices)] or [1]
    meshes = [jax.make_mesh((count,), ("tp",), devices=devices[:count]) for count in counts]
    print(f"{len(devices)} x {devices[0].device_kind}; bfloat16, batch {BATCH}, random weights")
    cases = []
    for name, sizes in MODELS.items():
        checked, timed = sizes.cut_down(), sizes.cut_down() if on_cpu else sizes
        print(f"{name} compared: {checked}")
        print(f"{name} timed:    {'the same' if timed == checked else timed}")
        cases.append((name, checked, timed))

    print(f"\n{'':11}  {'off from float64':>18}  {'us per layer':>17}")
    print(f"model ranks  {'absolute':>8} {'relative':>9}  {'fused':>8} {'psum':>8}  decision")
    right = True
    for name, checked, timed in cases:
        reference = float64_decode(checked)
        for mesh in meshes:
            right &= print_row(name, checked, timed, mesh, reference)

    if counts == [1]:
        print("One device: there is nothing to reduce, and both columns time the tail alone.")
    elif not any(decision(timed, mesh) for _, _, timed in cases for mesh in meshes):
        print("No kernel ran: fused_post_ff fell back to psum, so both columns time psum.")
    if not right:
        sys.exit(f"a relative difference is above {BOUND}")


if __name__ == "__main__":
    main()
