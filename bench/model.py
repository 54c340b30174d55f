"""Times a whole official model with random weights, tensor parallel, with the tails psum and fused.

Prefill: one prompt into the cache. Decode: the last tokens of that prompt once more, one by one, in
a loop inside one jit, for several batches. Both up to the logits, without sampling. Everything but
the tails is the same: the official modules, run by jax_gemma_arf.integrations.gemma.

Microseconds a step and tokens a second (wall time, median and half the interquartile range). The
psum tail runs under each of common.FLAG_SETS. The logits of each are compared with those of the
official model, partitioned by the compiler: a decode must arrive at what its prompt gives at once.
On one GPU, where there is nothing to reduce, and on a CPU, with a cut-down model, only psum runs.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import common
import jax
import jax.numpy as jnp
import report

import jax_gemma_arf as jga

#: ||out - want|| / ||want|| of bfloat16 logits; a model with its tails in the wrong order is off
#: by 1 or so.
BOUND = 2**-3

Params = Any
Cache = Any
#: Logits of the last token, [B, V], and the cache, which is donated.
Program = Callable[[Params, jax.Array, Cache], tuple[jax.Array, Cache]]


def official(name: str, layers: int, small: bool):
    """The text model of that class. layers: of a cut-down one, or 0 for all. small: narrow, too."""
    from gemma import gm  # noqa: PLC0415  # takes 10 s, so only children do

    cls = getattr(gm.nn, name, None)
    if cls is None:
        sys.exit(f"--model must be a class of gemma.gm.nn such as Gemma4_E2B, got {name!r}")
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
    """The cache with so many tokens in it, for the next to overwrite what follows."""
    return {
        name: layer | {"end_index": jnp.full_like(layer["end_index"], length)}
        for name, layer in cache.items()
    }


def apply(model, params: Params, tokens: jax.Array, cache: Cache, position, length: int):
    """Of tokens that begin at a position, with a cache of that length; logits of the last alone."""
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
    """The last so many tokens of a prompt that is in the cache, one by one.

    logits: what those of one sequence look like, which another trace would tell as well.
    """
    batch, length = tokens.shape

    def step(i, carry):
        position = length - steps + i
        token = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        return apply(model, params, token, carry[1], position, length)

    start = jnp.zeros((batch, logits.shape[1]), logits.dtype), at(cache, length - steps)
    return jax.lax.fori_loop(0, steps, step, start)


class Bench:
    """A model on the devices there are."""

    def __init__(self, arguments: argparse.Namespace):
        from jax_gemma_arf.integrations import gemma  # noqa: PLC0415

        mode, devices = common.devices_for(arguments.ranks)
        self.mode = "single" if mode == "loopback" else mode
        auto = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.make_mesh((len(devices),), ("tp",), axis_types=auto, devices=devices)
        self.clock = common.Clock(self.mesh, 5 if arguments.quick else arguments.repeats)
        small = self.mode == "cpu"
        self.prompt = 64 if small else arguments.prompt
        self.steps = 4 if small else arguments.steps
        self.batches = arguments.batches
        layers = arguments.layers or (4 if small or arguments.quick else 0)
        self.name, self.official = arguments.model, official(arguments.model, layers, small)
        self.flag_set = arguments.flag_set
        sharded = functools.partial(gemma.tensor_parallel, self.official, self.mesh)
        self.models = {"psum": sharded(implementation="xla")}
        self.param_shardings = functools.partial(gemma.param_shardings, self.models["psum"])
        if self.mode == "mesh" and self.flag_set == "A":
            self.models["fused"] = sharded(implementation="cuda")
        self.names = [f"{name}{again}" for again in ("", " again") for name in self.models]

    def parameters(self) -> Params:
        """Random ones, made where they lie.

        Each layer adds little to its residual, as in trained models; where it added much, rounding
        errors would grow from layer to layer until no two implementations agreed.
        """
        shapes = jax.eval_shape(
            self.models["psum"].init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
        )["params"]
        width = self.official.config.embed_dim

        # Gemma 2 and 3 store w for a scale of 1 + w.
        unit = 0 if self.name.startswith("Gemma4_") else 1

        @functools.cache
        def generator(shape, dtype, sharding, kind):
            def make(key):
                noise = jax.random.normal(key, shape, dtype)
                if kind == "skip_scale":
                    return 0.9 + noise / 64
                return 0.25 + noise / 16 - unit if kind == "scale" else noise * width**-0.5

            return jax.jit(make, out_shardings=sharding)

        leaves, tree = jax.tree.flatten_with_path(shapes)
        shardings = jax.tree.leaves(self.param_shardings(shapes))
        key = jax.random.key(0, impl="rbg")  # compiles fast
        params = []
        for i, ((path, leaf), sharding) in enumerate(zip(leaves, shardings)):
            kind = path[-1].key if path[-1].key in ("scale", "skip_scale") else "weight"
            make = generator(leaf.shape, leaf.dtype, sharding, kind)
            params.append(make(jax.random.fold_in(key, i)))
        return jax.tree.unflatten(tree, params)

    def tokens(self) -> jax.Array:
        """A prompt, [1, L], on all devices."""
        vocabulary = self.official.config.num_embed
        tokens = jax.random.randint(jax.random.key(1), (1, self.prompt), 1, vocabulary // 2)
        return jax.device_put(tokens, jax.NamedSharding(self.mesh, jax.P()))

    def empty_cache(self, batch: int) -> Cache:
        return self.models["psum"].init_cache(
            batch_size=batch, dtype=jnp.bfloat16, cache_length=self.prompt
        )

    def start(self, pool: concurrent.futures.Executor, program: Program, params, batch: int):
        """The future of a compiled program; what goes wrong is the future's."""
        cache = self.empty_cache(batch)
        jitted = jax.jit(
            program,
            donate_argnums=2,
            out_shardings=(None, jax.tree.map(lambda a: a.sharding, cache)),
        )
        tokens = jnp.repeat(self.tokens(), batch, axis=0)
        return common.start(pool, lambda: jitted.lower(params, tokens, cache))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of each implementation: its prefill, then its decodes of the prompt's copies."""
        params, tokens = self.parameters(), self.tokens()
        lowered = jax.jit(self.reference).lower(params, tokens)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            reference = pool.submit(lowered.compile)
            programs = {}
            for name, model in self.models.items():
                program = functools.partial(prefill, model)
                programs[name, "prefill", 1] = self.start(pool, program, params, 1)
                for batch in self.batches:
                    program = functools.partial(decode, model, self.steps, lowered.out_info)
                    programs[name, "decode", batch] = self.start(pool, program, params, batch)
        want = reference.result()(params, tokens)
        filled = None
        for phase, batch in (("prefill", 1), *(("decode", batch) for batch in self.batches)):
            prompts = jnp.repeat(tokens, batch, axis=0)
            for name in self.names:
                row: dict[str, Any] = {
                    "model": self.name,
                    "phase": phase,
                    "batch": batch,
                    "tokens": batch * (self.prompt if phase == "prefill" else 1),
                    "implementation": name,
                    "flag_set": self.flag_set,
                }
                try:
                    program = programs[name.removesuffix(" again"), phase, batch].result()
                    cache = self.empty_cache(1) if phase == "prefill" else copies(filled, batch)
                    run = Run(program, params, prompts, cache)
                    row["relative_error"] = relative_error(run(), want)
                    row["matches"] = row["relative_error"] <= BOUND
                    steps = 1 if phase == "prefill" else self.steps
                    row["step_us"] = self.clock.microseconds(run, steps)
                    if phase == "prefill" and filled is None:
                        filled = run.cache
                except Exception as error:  # an implementation that fails is a result, too
                    row["error"] = f"{type(error).__name__}: {error}"[:500]
                yield row

    def reference(self, params: Params, tokens: jax.Array) -> jax.Array:
        """The official model's logits of the last token, without a cache."""
        out = self.official.apply({"params": params}, tokens, return_last_only=True)
        return out.logits


class Run:
    """Calls of a program, each with the cache that the one before left."""

    def __init__(self, program: Program, params: Params, tokens: jax.Array, cache: Cache):
        self.program, self.params, self.tokens, self.cache = program, params, tokens, cache

    def __call__(self) -> jax.Array:
        logits, self.cache = self.program(self.params, self.tokens, self.cache)
        return logits


def copies(cache: Cache, batch: int) -> Cache:
    """A cache of one sequence as one of so many, lying as that one does."""
    shardings = jax.tree.map(lambda a: a.sharding, cache)
    repeat = functools.partial(jnp.repeat, repeats=batch, axis=0)
    return jax.jit(lambda c: jax.tree.map(repeat, c), out_shardings=shardings)(cache)


@jax.jit
def _relative_error(out: jax.Array, want: jax.Array) -> jax.Array:
    out, want = out.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.max(jnp.linalg.norm(out - want, axis=-1)) / jnp.linalg.norm(want)


def relative_error(out: jax.Array, want: jax.Array) -> float:
    """||out - want|| / ||want|| of the worst sequence. out: [B, V]; want: [1, V]."""
    return float(_relative_error(out, want))


def work(arguments: argparse.Namespace) -> None:
    """A child's part: all implementations of one flag set."""
    jax.config.update("jax_num_cpu_devices", 8)
    jga.set_peer_timeout(20)  # what hangs is a failed timing
    bench = Bench(arguments)
    facts = {
        "mode": bench.mode,
        "ranks": bench.mesh.size,
        "device": bench.mesh.devices.flat[0].device_kind,
        "layers": bench.official.config.num_layers,
        "hidden": bench.official.config.embed_dim,
        "prompt": bench.prompt,
        "steps": bench.steps,
        "timings": len(bench.names) * (1 + len(bench.batches)),
    }
    common.emit({"facts": facts})
    for row in bench.rows():
        common.emit(row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a whole Gemma model, psum and fused.")
    common.add_arguments(parser, child_seconds=480)
    parser.add_argument(
        "--model", default="Gemma4_E2B", help="a Gemma 2, 3 or 4 class of gemma.gm.nn"
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="cut down to so many, a multiple of 4; 0: all"
    )
    parser.add_argument("--batches", type=int, nargs="+", help="of the decodes; default: 1 and 16")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens, and length of the cache")
    parser.add_argument("--steps", type=int, default=16, help="of each timed decode")
    parser.add_argument("--flag-sets", nargs="+", choices=common.FLAG_SETS, default=None)
    arguments = parser.parse_args()
    if arguments.layers % 4:
        parser.error(f"--layers must be a multiple of 4, got {arguments.layers}")
    if not 1 <= arguments.steps <= arguments.prompt:
        parser.error(f"--steps must be 1 to --prompt, got {arguments.steps}")
    if importlib.util.find_spec("gemma") is None:
        parser.error("needs google-deepmind/gemma: pip install '.[bench,gemma]'")
    quick = arguments.quick
    arguments.batches = arguments.batches or ([1] if quick else [1, 16])
    if common.in_child(arguments):
        work(arguments)
        return
    flag_sets = arguments.flag_sets or (["A", "C"] if quick else list(common.FLAG_SETS))
    content = common.run_children(flag_sets, arguments, "{implementation}, {phase}, batch {batch}")
    report.finish("model", content, arguments.out)


if __name__ == "__main__":
    main()
