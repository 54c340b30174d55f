"""Times whole official Gemma models with random weights against what one would run instead.

Four implementations run the same parameters:

- "official, one GPU": the unmodified model on one device, left out where it does not fit.
- "official, partitioned": the unmodified model over all devices, partitioned by the compiler, with
  the shardings that tensor_parallel uses.
- "psum": tensor_parallel(implementation="xla").
- "fused": tensor_parallel(implementation="cuda").

Phases: "prefill" puts one prompt into the cache. "decode" feeds the last tokens of that prompt once
more, one by one, in a loop inside one jit, at several batch sizes. "sampler" is the loop of the
package's own samplers (gm.text.Sampler and Gemma4Sampler share it), greedy, at the smallest batch.

A row has microseconds a step (wall time) and the floor. A decode on GPUs also has the number of
kernels a step and where the time goes, from a profile. The first sequence of every prefill and
decode is compared with the logits of the official model; the other sequences decode other tokens
behind the same prompt. On a CPU, where times mean nothing, a cut-down model tries the script out
without "fused".
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import report
import xplane

#: ||out - want|| / ||want|| of bfloat16 logits. After 60 layers the official model, which rounds in
#: its norms, is off by 0.15 from float32, and tensor_parallel by 0.10 (a narrow 31B on a CPU); a
#: model with its tails in the wrong order is off by 1 or so.
BOUND = 2**-2

MODELS = ("Gemma4_E2B", "Gemma4_E4B", "Gemma3_4B", "Gemma4_26B_A4B", "Gemma4_31B")
OFFICIAL_ALONE, OFFICIAL_PARTITIONED = "official, one GPU", "official, partitioned"

Params = Any
Cache = Any
#: Logits of the last token, [B, V], and the cache, which is donated.
Program = Callable[[Params, jax.Array, Cache], tuple[jax.Array, Cache]]


def official(name: str, layers: int, small: bool):
    """The text model of that class. layers: of a cut-down one, or 0 for all. small: narrow, too."""
    from gemma import gm  # noqa: PLC0415  # takes 10 s, so only children do

    cls = getattr(gm.nn, name, None)
    if cls is None:
        sys.exit(f"--models must be classes of gemma.gm.nn such as Gemma4_E2B, got {name!r}")
    config = cls().config
    changes: dict[str, Any] = {"vision_encoder": None}
    if small:
        changes |= {"num_embed": 512, "embed_dim": 256, "hidden_dim": 256, "head_dim": 32}
        changes |= {"num_heads": 4, "num_kv_heads": 2, "sliding_window_size": 16}
        small_if_set = {"global_key_size": 64, "num_global_kv_heads": 1}
        small_if_set |= {"override_kv_shared_ffw_hidden": 512, "per_layer_input_dim": 16}
        small_if_set |= {"num_experts": 8, "expert_dim": 64, "moe_dense_hidden_dim": 256}
        changes |= {key: n for key, n in small_if_set.items() if getattr(config, key, None)}
    if layers:
        kinds = type(config.attention_types[0])
        changes["attention_types"] = (kinds.LOCAL_SLIDING, kinds.GLOBAL) * (layers // 2)
        if sharing := getattr(config, "kv_cache_sharing_config", None):
            # What is shared is the last global and local layer's of the first half.
            sharing = dataclasses.replace(sharing, frac_shared_layers=0.5)
            changes["kv_cache_sharing_config"] = sharing
    return cls(config=dataclasses.replace(config, **changes))


def at(cache: Cache, length: int) -> Cache:
    """Returns the cache cut to `length` tokens: the next token overwrites what follows."""
    return {
        name: layer | {"end_index": jnp.full_like(layer["end_index"], length)}
        for name, layer in cache.items()
    }


def apply(model, params: Params, tokens: jax.Array, cache: Cache, position, length: int):
    """Applies the model to tokens from `position` on. Returns the last logits and the cache."""
    positions = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    mask = jnp.arange(length) <= positions[:, None]
    out = model.apply(
        {"params": params},
        tokens,
        cache=cache,
        positions=jnp.broadcast_to(positions, tokens.shape),
        attention_mask=jnp.broadcast_to(mask, (*tokens.shape, length)),
        return_last_only=True,
    )
    return out.logits, out.cache


def prefill(model, params: Params, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """The whole prompt."""
    return apply(model, params, tokens, at(cache, 0), 0, tokens.shape[1])


def decode(
    model, steps: int, logits: Any, params: Params, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Decodes the last `steps` tokens of a prompt that is in the cache, one by one.

    logits: shape and dtype of the logits of one sequence, which another trace would tell as well.
    """
    batch, length = tokens.shape

    def step(i, carry):
        position = length - steps + i
        token = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        return apply(model, params, token, carry[1], position, length)

    start = jnp.zeros((batch, logits.shape[1]), logits.dtype), at(cache, length - steps)
    return jax.lax.fori_loop(0, steps, step, start)


def sample(
    model, steps: int, logits: Any, params: Params, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs the loop of the package's samplers; returns the number of steps done instead of logits.

    The end tokens are ids that no model predicts, so the loop runs to its last step. It begins two
    tokens early, since it would stop when the cache is full.
    """
    from gemma.gm.text import _sampler_loop, _sampling  # noqa: PLC0415

    del logits
    batch, length = tokens.shape
    start = length - steps - 2
    module: Any = _sampler_loop  # whose dataclasses a type checker does not see through
    loop = module.SamplerLoop(
        model=model,
        end_tokens=(-1,),
        forbidden_tokens=None,
        sampling=_sampling.Greedy(),
        cache_length=length,
        special_tokens=SpecialTokens,
    )
    state = module.SamplingState(
        step=jnp.asarray(0),
        done=jnp.zeros(batch, jnp.bool_),
        last_token=tokens[:, start],
        last_token_pos=jnp.full(batch, start),
        predicted_tokens=jnp.zeros((batch, length), jnp.int32),
        cache=at(cache, start),
        rng=jax.random.key(0),
        init_cache_length=jnp.asarray(start),
        full_attention_mask=jnp.ones((batch, length), jnp.bool_),
    )
    state = loop.sample(params=params, init_state=state, max_new_tokens=jnp.asarray(steps))
    return state.step, state.cache


class SpecialTokens:
    """Stand-in for the special tokens of a tokenizer, which would have to be downloaded."""

    EOS = END_OF_TURN = BEGIN_OF_TOOL_RESPONSE = -1


def kv_sources(config) -> list[int]:
    """The layer whose keys and values each layer attends to; its own unless the model shares."""
    layers = config.num_layers
    if getattr(config, "kv_cache_sharing_config", None) is None:
        return [*range(layers)]
    from gemma.gm.nn.gemma4 import _config  # noqa: PLC0415

    return _config.create_kv_cache_sharing_patterns(
        config.kv_cache_sharing_config, layers, config.attention_types
    )


def local_size(array: jax.ShapeDtypeStruct) -> int:
    """Number of elements of an array on one device."""
    return math.prod(array.sharding.shard_shape(array.shape))


class Work(NamedTuple):
    """Bytes and operations of one device in a step."""

    bytes: float
    flops: float

    def microseconds(self, bandwidth: float, rate: float) -> float:
        """The floor: reading or matmuls, whichever takes longer."""
        return max(self.bytes / bandwidth, self.flops / rate) * 1e6


def step_work(
    config, params: Params, cache: Cache, tokens: int = 1, *, every_expert: bool = False
) -> Work:
    """The bytes that a step must read on one device, and the operations of its matmuls.

    Parameters count once; of the embedding tables only the one that the logits multiply, since a
    lookup reads a few rows. Of the experts those count that the tokens can choose, unless
    every_expert. A decode also reads the window of the cache that each layer attends to, once for
    the layers that share it. The operations of attention itself are left out.

    Args:
      params, cache: trees of ShapeDtypeStruct with shardings; the cache says what the batch is.
      tokens: of one sequence in one step.
    """
    batch, length = cache["layer_0"]["positions"].shape
    rows = batch * tokens
    experts = getattr(config, "num_experts", 0)
    chosen = experts if every_expert else min(experts, rows * getattr(config, "top_k_experts", 0))
    sources = kv_sources(config)
    total_bytes = flops = 0.0
    for path, leaf in jax.tree.leaves_with_path(params):
        keys = tuple(entry.key for entry in path)
        layer = int(keys[0].removeprefix("layer_")) if keys[0].startswith("layer_") else None
        if keys[-1] == "per_layer_embeddings":
            continue
        if layer is not None and sources[layer] != layer and keys[-2] in ("k_einsum", "kv_einsum"):
            continue  # there, but never used
        size = local_size(leaf)
        read, multiplied = size, rows * size
        if keys[-1] == "input_embedding":
            multiplied = batch * size  # the logits of the last token
        elif experts and keys[1:] in (("mlp", "gating_einsum", "w"), ("mlp", "linear", "w")):
            read, multiplied = size * chosen / experts, rows * size * config.top_k_experts / experts
        elif leaf.ndim < 2:
            multiplied = 0
        total_bytes += read * leaf.dtype.itemsize
        flops += 2 * multiplied
    if tokens == 1:
        for i, kind in enumerate(config.attention_types):
            window = config.sliding_window_size if kind.name == "LOCAL_SLIDING" else length
            if sources[i] == i:
                kept = [cache[f"layer_{i}"][name] for name in ("k", "v")]
                size = sum(local_size(array) * array.dtype.itemsize for array in kept)
                total_bytes += size * min(window, length) / length
    return Work(total_bytes, flops)


class Side(NamedTuple):
    """Models that run on one mesh, by the name of the implementation."""

    mesh: jax.sharding.Mesh
    models: dict[str, Any]


class Bench(common.Bench):
    """A model on the devices there are."""

    def __init__(self, arguments: argparse.Namespace):
        from jax_gemma_arf.integrations import gemma  # noqa: PLC0415

        super().__init__(arguments, "single")
        small = self.mode == "cpu"
        self.repeats = 2 if arguments.quick else arguments.repeats
        self.prompt = 64 if small else arguments.prompt
        self.steps = 4 if small else arguments.steps
        self.profile = self.mode != "cpu" and not arguments.no_profile
        layers = arguments.layers or (4 if small or arguments.quick else 0)
        (self.name,) = arguments.models
        self.official = official(self.name, layers, small)

        mesh, alone = self.mesh, common.tp_mesh(self.devices[:1])
        self.psum = gemma.tensor_parallel(self.official, mesh, implementation="xla")
        self.shardings = gemma.param_shardings(self.psum)
        over_mesh = {OFFICIAL_PARTITIONED: self.official, "psum": self.psum}
        if self.mode == "mesh" and self.flag_set == "A":
            fused = gemma.tensor_parallel(self.official, mesh, implementation="cuda")
            over_mesh = {"fused": fused, **over_mesh}
        self.sides = [Side(mesh, over_mesh)]
        if self.mode == "single":
            self.sides = [Side(mesh, {OFFICIAL_ALONE: self.official, "psum": self.psum})]
        elif self.flag_set == "A":
            self.sides.insert(0, Side(alone, {OFFICIAL_ALONE: self.official}))

        if chosen := set(arguments.implementations or ()):
            self.sides = [
                side._replace(models={k: v for k, v in side.models.items() if k in chosen})
                for side in self.sides
                if chosen & side.models.keys()
            ]
        batches = arguments.batches
        self.lines = [("prefill", 1), *(("decode", batch) for batch in batches)]
        self.sampled = {OFFICIAL_ALONE, "fused" if "fused" in over_mesh else "psum"}
        self.sampler_line = ("sampler", min(batches))
        self.bandwidth = common.copy_bandwidth(mesh)
        self.matmul_rate = common.matmul_rate(mesh)

    def lines_of(self, name: str) -> list[tuple[str, int]]:
        """(phase, batch) of each row of an implementation."""
        return [*self.lines, self.sampler_line] if name in self.sampled else self.lines

    def param_structs(self, side: Side) -> Params:
        """Shapes and shardings of the parameters on the mesh of a side."""
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = jax.eval_shape(self.official.init, jax.random.key(0), token)["params"]
        shardings = self.shardings
        if side.mesh != self.mesh:
            shardings = jax.tree.map(lambda _: jax.NamedSharding(side.mesh, jax.P()), shapes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        )

    def parameters(self, side: Side) -> Params:
        """Random ones, made where they lie, the same on every mesh.

        Each layer adds little to its residual, as in trained models; where it added much, rounding
        errors would grow from layer to layer until no two implementations agreed.
        """
        width = self.official.config.embed_dim
        # Gemma 2 and 3 store w for a scale of 1 + w.
        unit = 0 if self.name.startswith("Gemma4_") else 1

        @functools.cache
        def generator(shape, dtype, sharding, kind):
            def make(seed):
                values = noise(shape, seed)
                if kind == "skip_scale":
                    values = 0.9 + values / 64
                elif kind == "scale":
                    values = 0.25 + values / 16 - unit
                else:
                    values = values * width**-0.5
                return values.astype(dtype)

            return jax.jit(make, out_shardings=sharding)

        leaves, tree = jax.tree.flatten_with_path(self.param_structs(side))
        params = []
        for i, (path, leaf) in enumerate(leaves):
            kind = path[-1].key if path[-1].key in ("scale", "skip_scale") else "weight"
            make = generator(leaf.shape, leaf.dtype, leaf.sharding, kind)
            params.append(make(jnp.uint32(i)))
        return jax.tree.unflatten(tree, params)

    def tokens(self, side: Side, batch: int = 1) -> jax.Array:
        """The prompt, [B, L], on all devices of a side; sequences after the first are shifted.

        Equal sequences would choose the same experts.
        """
        vocabulary = self.official.config.num_embed
        tokens = jax.random.randint(jax.random.key(1), (self.prompt,), 1, vocabulary // 2)
        tokens = jnp.stack([jnp.roll(tokens, shift) for shift in range(batch)])
        return jax.device_put(tokens, jax.NamedSharding(side.mesh, jax.P()))

    def empty_cache(self, side: Side, model) -> Cache:
        """The cache of one sequence. The official model's is sharded like the psum model's."""
        sizes = {"batch_size": 1, "dtype": jnp.bfloat16, "cache_length": self.prompt}
        cache = model.init_cache(**sizes)
        if model is not self.official:
            return cache
        sharded = self.psum.init_cache(**sizes) if side.mesh == self.mesh else cache

        def place(array, like):
            spec = like.sharding.spec if side.mesh == self.mesh else jax.P()
            heads_split = len(spec) > 2 and spec[2] is not None
            if heads_split and array.shape[2] % side.mesh.size:
                spec = jax.P()  # fewer KV heads than devices
            return jax.device_put(array, jax.NamedSharding(side.mesh, spec))

        return jax.tree.map(place, cache, sharded)

    def start_side(self, side: Side, pool: concurrent.futures.Executor) -> dict[Any, Any]:
        """Starts to compile the programs of a side; futures by implementation, phase and batch."""
        params = self.param_structs(side)
        lower = functools.partial(jax.jit(self.reference).lower, params, self.tokens(side))
        logits = jax.eval_shape(self.reference, params, self.tokens(side))
        programs: dict[Any, Any] = {"reference": common.start(pool, lower)}
        for name, model in side.models.items():
            cache = self.empty_cache(side, model)
            for phase, batch in self.lines_of(name):
                body = functools.partial(prefill, model)
                if phase != "prefill":
                    loop = {"decode": decode, "sampler": sample}[phase]
                    body = functools.partial(loop, model, self.steps, logits)
                structs = batched(cache, batch)
                jitted = jax.jit(
                    body,
                    donate_argnums=2,
                    out_shardings=(None, jax.tree.map(lambda a: a.sharding, structs)),
                )
                repeated = self.tokens(side, batch)
                programs[name, phase, batch] = common.start(
                    pool, functools.partial(jitted.lower, params, repeated, structs)
                )
        return programs

    def lacking(self, side: Side) -> str | None:
        """Why the models of a side do not fit the memory of one device, or None if they do."""
        stats = side.mesh.devices.flat[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        params = sum(
            local_size(a) * a.dtype.itemsize for a in jax.tree.leaves(self.param_structs(side))
        )
        cache = batched(self.empty_cache(side, next(iter(side.models.values()))), self.lines[-1][1])
        caches = 3 * sum(local_size(a) * a.dtype.itemsize for a in jax.tree.leaves(cache))
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        if params + caches + (2 << 30) <= free:
            return None
        return (
            f"{self.name}: {', '.join(side.models)}: left out: {params / 1e9:.1f} GB of parameters "
            f"and {caches / 1e9:.1f} GB for caches do not fit the {free / 1e9:.1f} GB that are free"
        )

    def facts(self) -> dict[str, Any]:
        names = [name for side in self.sides for name in side.models]
        return {
            "prompt": self.prompt,
            "steps": self.steps,
            "timings": sum(len(self.lines_of(name)) for name in names),
            self.name: {
                "layers": self.official.config.num_layers,
                "hidden": self.official.config.embed_dim,
                "bandwidth": self.bandwidth,
                "matmul_rate": self.matmul_rate,
            },
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of each side, one implementation after the other; notes on what is left out."""
        notes = {i: note for i, side in enumerate(self.sides) if (note := self.lacking(side))}
        yield from ({"note": note} for note in notes.values())
        sides = [side for i, side in enumerate(self.sides) if i not in notes]
        want = None
        workers = min(16, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            started = [self.start_side(side, pool) for side in sides]
            # Compilers at work, which try out kernels on the GPUs, would disturb the timings.
            concurrent.futures.wait(
                [future for programs in started for future in programs.values()]
            )
            for side, programs in zip(sides, started):
                params = clock = None  # frees the parameters of the previous side
                try:
                    params = self.parameters(side)
                    if want is None:
                        reference = programs["reference"].result()
                        want = np.asarray(reference(params, self.tokens(side)))
                except Exception as error:  # the other side may do better
                    yield {"note": f"{self.name}: {', '.join(side.models)}: {error}"[:500]}
                    continue
                clock = common.Clock(side.mesh, self.repeats, runs=2)
                for name, model in side.models.items():
                    yield from self.rows_of(side, name, model, params, programs, clock, want)

    def rows_of(self, side, name, model, params, programs, clock, want) -> Iterator[dict[str, Any]]:
        """Rows of one implementation: its prefill fills the cache for the others."""
        filled = None
        for phase, batch in self.lines_of(name):
            row: dict[str, Any] = {
                "model": self.name,
                "phase": phase,
                "batch": batch,
                "tokens": batch * (self.prompt if phase == "prefill" else 1),
                "implementation": name,
                "flag_set": self.flag_set,
                "ranks": side.mesh.size,
            }
            run = None
            try:
                start = self.empty_cache(side, model)
                row |= self.floors(side, batched(start, batch), phase)
                program = programs.pop((name, phase, batch)).result()
                if phase != "prefill":
                    if filled is None:
                        raise RuntimeError("the prefill failed, so there is no cache")
                    start = copies(filled, batch)
                run = Run(program, params, self.tokens(side, batch), start)
                del start
                out = run()
                if phase == "sampler":
                    row["matches"] = int(out) == self.steps
                else:
                    row["relative_error"] = common.relative_error(out[:1], want)
                    row["matches"] = row["relative_error"] <= BOUND
                steps = 1 if phase == "prefill" else self.steps
                row["step_us"] = clock.microseconds(run, steps)
                if self.profile and phase == "decode":
                    row |= profiled(run, steps)
                if phase == "prefill":
                    filled = run.cache
            except Exception as error:
                row |= common.failure(error)
            del run
            yield row

    def floors(self, side: Side, cache: Cache, phase: str) -> dict[str, float]:
        """Returns the floor of a step; with a mixture of experts, also if it reads all of them."""
        config, params = self.official.config, self.param_structs(side)
        tokens = self.prompt if phase == "prefill" else 1
        work = step_work(config, params, cache, tokens)
        floors = {"floor_us": work.microseconds(self.bandwidth, self.matmul_rate)}
        if getattr(config, "enable_moe", False):
            work = step_work(config, params, cache, tokens, every_expert=True)
            floors["floor_all_experts_us"] = work.microseconds(self.bandwidth, self.matmul_rate)
        return floors

    def reference(self, params: Params, tokens: jax.Array) -> jax.Array:
        """The official model's logits of the last token, without a cache."""
        out = self.official.apply({"params": params}, tokens, return_last_only=True)
        return out.logits


def noise(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Uniform float32 numbers of mean 0 and variance 1, the same however they are sharded.

    Each is a hash of its index and the seed, so every device makes its own and no more.
    """

    def mix(bits):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
        return bits ^ (bits >> 16)

    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    bits = mix(mix(index) ^ mix(seed + jnp.uint32(1)))
    return (bits.astype(jnp.float32) * 2.0**-31 - 1) * 3**0.5


class Run:
    """Calls of a program, each with the cache that the one before left."""

    def __init__(self, program: Program, params: Params, tokens: jax.Array, cache: Cache):
        self.program, self.params, self.tokens, self.cache = program, params, tokens, cache

    def __call__(self) -> jax.Array:
        logits, self.cache = self.program(self.params, self.tokens, self.cache)
        return logits


def profiled(run: Run, steps: int) -> dict[str, Any]:
    """Kernels and profiled microseconds of a step, and the shares of classes and of overlap.

    overlap is the share of kernels that start early (xplane.overlap). The shares of the classes add
    up to 1, the time from the first kernel to the last on one device. Returns {} if the trace has
    no GPU.
    """
    trace = xplane.traced(run)
    if not trace:
        return {}
    device = min(trace)
    times = xplane.attribute(trace)[device]
    total = sum(times.values())
    return {
        "kernels": len(trace[device]) / steps,
        "profiled_us": total / steps,
        "overlap": xplane.overlap(trace[device]),
        "shares": {kind: time / total for kind, time in times.items()},
    }


def batched(cache: Cache, batch: int) -> Cache:
    """Shapes and shardings of a cache like this one of a single sequence, with n sequences."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype, sharding=a.sharding), cache
    )


def copies(cache: Cache, batch: int) -> Cache:
    """Repeats a cache of batch 1 to batch n, with the same sharding."""
    shardings = jax.tree.map(lambda a: a.sharding, cache)
    repeat = functools.partial(jnp.repeat, repeats=batch, axis=0)
    return jax.jit(lambda c: jax.tree.map(repeat, c), out_shardings=shardings)(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times whole Gemma models.")
    common.add_arguments(parser, child_seconds=150)
    parser.set_defaults(repeats=5)
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="CLASS",
        default=["Gemma4_E2B"],
        help=f"Gemma 2, 3 or 4 classes of gemma.gm.nn, or all: {' '.join(MODELS)}",
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="number of layers to keep, a multiple of 4; 0: all"
    )
    parser.add_argument("--batches", type=int, nargs="+", help="of the decodes; default: 1, 2, 16")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=(OFFICIAL_ALONE, OFFICIAL_PARTITIONED, "psum", "fused"),
        help="default: all; the compiler is slow for 26B-A4B on one GPU",
    )
    parser.add_argument("--prompt", type=int, default=1024, help="tokens, and length of the cache")
    parser.add_argument(
        "--steps",
        type=int,
        default=64,
        help="of each timed decode; a run costs 2 to 3 ms once, which is divided by them",
    )
    parser.add_argument("--flag-sets", nargs="+", choices=common.FLAG_SETS, default=["A"])
    parser.add_argument("--no-profile", action="store_true", help="wall times alone")
    arguments = parser.parse_args()
    if arguments.layers % 4:
        parser.error(f"--layers must be a multiple of 4, got {arguments.layers}")
    if not 1 <= arguments.steps <= arguments.prompt - 2:
        parser.error(f"--steps must be 1 to --prompt - 2, got {arguments.steps}")
    if importlib.util.find_spec("gemma") is None:
        parser.error("needs google-deepmind/gemma: pip install '.[bench,gemma]'")
    arguments.batches = arguments.batches or ([1] if arguments.quick else [1, 2, 16])
    if common.in_child(arguments):
        common.work(Bench, arguments)
        return
    # Nothing but the package's small workspaces lies outside JAX's pool.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    models = MODELS if arguments.models == ["all"] else arguments.models
    label = "{model}, {implementation}, {phase}, batch {batch}"
    content = common.run_children(
        arguments.flag_sets, arguments, label, [("--models", name) for name in models]
    )
    report.finish("model", content, arguments.out)


if __name__ == "__main__":
    main()
