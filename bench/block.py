"""Times whole Gemma 4 blocks, decode and prefill, with the tails as psum and fused.

A block here is what surrounds the tails: pre-norm, a projection to the heads, the out-projection
and its tail, pre-norm, the gated feed-forward and its tail, at real sizes, tensor parallel over all
GPUs, with enough layers for the weights to stream from memory. Attention itself is left out, and in
26B-A4B the experts.

Microseconds a layer (wall time, median and half the interquartile range), beside two floors: the
same block with its tails and norms left out, and the time to read its weights once at the copy
bandwidth measured here. The psum tail runs under each of common.FLAG_SETS. Every implementation is
compared with the unsharded block. A profile on a mesh of GPUs shows the gap in front of each fused
tail. On one GPU all ranks share it (loopback), with their projections as batched products; on a CPU
only psum runs, with cut-down sizes.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import report
import xplane
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from jax_gemma_arf import loopback
from jax_gemma_arf.__main__ import GEMMA4_WIDTHS as WIDTHS
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf._src.reference import post_ff_tail, rmsnorm

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK_TOKENS = (4, 1024)
#: ||out - want|| / ||want|| of a stack of bfloat16 blocks; adding before the norm gives 0.5.
BOUND = 2**-5

Layer = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A block. heads: the width of the attention's output. scalar: whether the block ends with it
    (in E4B it comes after the per-layer inputs)."""

    width: int
    ff: int
    heads: int
    scalar: bool = True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one layer's parameters, by name."""
        return {
            "pre_attention_norm": (self.width,),
            "w_heads": (self.width, self.heads),
            "w_out": (self.heads, self.width),
            "post_attention_norm": (self.width,),
            "pre_ff_norm": (self.width,),
            "w_gate": (self.width, self.ff),
            "w_up": (self.width, self.ff),
            "w_down": (self.ff, self.width),
            "post_ff_norm": (self.width,),
        }

    def weight_bytes(self) -> int:
        """Returns the bytes of one layer's weights, over all ranks, in bfloat16."""
        return 2 * self.width * (2 * self.heads + 3 * self.ff)


MODELS = {
    "31B": Sizes(WIDTHS["31B"], ff=21504, heads=8192),
    "26B-A4B": Sizes(WIDTHS["26B-A4B"], ff=2112, heads=4096),
    "E4B": Sizes(WIDTHS["E4B"], ff=10240, heads=2048, scalar=False),
}
SPECS = {
    "w_heads": P(None, "tp"),
    "w_gate": P(None, "tp"),
    "w_up": P(None, "tp"),
    "w_out": P("tp", None),
    "w_down": P("tp", None),
}


def feed_forward(x: jax.Array, p: Layer, project: Callable) -> jax.Array:
    """Partial sums of the gated feed-forward."""
    return project(jax.nn.gelu(x @ p["w_gate"]) * (x @ p["w_up"]), p["w_down"])


def with_post_ff(h: jax.Array, layers: list[Layer], scalar: tuple, tail, project) -> jax.Array:
    """Blocks whose tails are calls of fused_post_ff; XLA does the pre-norms."""
    for p in layers:
        heads = rmsnorm(h, p["pre_attention_norm"]) @ p["w_heads"]
        h = tail(project(heads, p["w_out"]), h, p["post_attention_norm"])
        x = rmsnorm(h, p["pre_ff_norm"])
        h = tail(feed_forward(x, p, project), h, p["post_ff_norm"], *scalar)
    return h


def with_sandwich(h: jax.Array, layers: list[Layer], scalar: tuple, tail, project) -> jax.Array:
    """Blocks whose tails are calls of fused_sandwich, which does the next pre-norm too."""
    x = rmsnorm(h, layers[0]["pre_attention_norm"])
    for p, following in zip(layers, (*layers[1:], layers[0])):
        sums = project(x @ p["w_heads"], p["w_out"])
        h, x = tail(sums, h, p["post_attention_norm"], next_norm_scale=p["pre_ff_norm"])
        sums = feed_forward(x, p, project)
        after = following["pre_attention_norm"]
        h, x = tail(sums, h, p["post_ff_norm"], *scalar, next_norm_scale=after)
    return h


def matmuls_alone(h: jax.Array, layers: list[Layer], scalar: tuple, tail, project) -> jax.Array:
    """Without norms, all-reduce, residual and scalar: no tail can take less than nothing."""
    del scalar, tail
    for p in layers:
        h = project(h @ p["w_heads"], p["w_out"])
        h = feed_forward(h, p, project)
    return h


class Bench(common.Bench):
    """A model's blocks on the devices there are."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.clock = common.Clock(self.mesh, 5 if arguments.quick else arguments.repeats)
        self.layers = arguments.layers or {"cpu": 2}.get(self.mode, 4 if arguments.quick else 8)

    def sizes(self, model: str) -> Sizes:
        sizes = MODELS[model]
        return sizes if self.mode != "cpu" else Sizes(sizes.width // 4, ff=1024, heads=512)

    def _generator(self, make: Callable, specs: Any) -> Callable:
        shardings = jax.tree.map(functools.partial(jax.NamedSharding, self.mesh), specs)
        return jax.jit(make, out_shardings=shardings)

    def parameters(self, sizes: Sizes) -> list[Layer]:
        """Random layers, sharded over the ranks as tensor parallelism does."""
        shapes = sizes.shapes()

        def make(key):
            layer = {}
            for noise_key, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items()):
                noise = jax.random.normal(noise_key, shape, jnp.bfloat16)
                layer[name] = noise * shape[0] ** -0.5 if len(shape) == 2 else 1 + noise / 8
            return layer

        generate = self._generator(make, {name: SPECS.get(name, P()) for name in shapes})
        key = jax.random.key(0, impl="rbg")  # compiles fast
        return [generate(jax.random.fold_in(key, index)) for index in range(self.layers)]

    def hidden(self, sizes: Sizes, tokens: int) -> jax.Array:
        shape = (tokens, sizes.width)
        generate = self._generator(lambda key: jax.random.normal(key, shape, jnp.bfloat16), P())
        return generate(jax.random.key(1, impl="rbg"))

    def implementations(self) -> Mapping[str, tuple[Callable, Callable | None]]:
        """Name: (blocks, tail)."""
        if self.mode == "loopback":
            return {
                "sum": (with_post_ff, lambda x, *others: post_ff_tail(common.rank_sum(x), *others)),
                "fused": (with_post_ff, loopback_post_ff),
                "fused sandwich": (with_sandwich, loopback_sandwich),
                "matmuls alone": (matmuls_alone, None),
            }
        tail = functools.partial(jga.fused_post_ff, axis_name="tp")
        sandwich = functools.partial(jga.fused_sandwich, axis_name="tp", implementation="cuda")
        psum = {"psum": (with_post_ff, functools.partial(tail, implementation="xla"))}
        if self.mode == "cpu" or self.flag_set != "A":
            return psum
        return psum | {
            "fused": (with_post_ff, functools.partial(tail, implementation="cuda")),
            "fused sandwich": (with_sandwich, sandwich),
            "matmuls alone": (matmuls_alone, None),
        }

    def program(self, sizes: Sizes, blocks: Callable, tail: Callable | None):
        """Jitted: (h, layers) -> h, tensor parallel."""
        scalar = (0.5,) if sizes.scalar else ()
        if self.mode == "loopback":
            project = functools.partial(project_ranks, ranks=self.ranks)
            if tail is None:
                project = jnp.matmul
            return jax.jit(lambda h, layers: blocks(h, layers, scalar, tail, project))
        specs = [{name: SPECS.get(name, P()) for name in sizes.shapes()}] * self.layers
        return jax.jit(
            jax.shard_map(
                lambda h, layers: blocks(h, layers, scalar, tail, jnp.matmul),
                mesh=self.mesh,
                in_specs=(P(), specs),
                out_specs=P(),
                check_vma=False,
            )
        )

    def reference(self, sizes: Sizes):
        """Jitted: (h, layers) -> h, unsharded, as XLA's partitioner sees it."""
        scalar = (0.5,) if sizes.scalar else ()
        return jax.jit(lambda h, layers: with_post_ff(h, layers, scalar, post_ff_tail, jnp.matmul))

    def cases(
        self, models: Sequence[str], tokens: Sequence[int], names: Collection[str]
    ) -> Iterator[tuple[dict[str, Any], Callable[[], jax.Array]]]:
        """Rows yet without times, each with the call to time unless the row has an error."""
        chosen = {name: how for name, how in self.implementations().items() if name in names}
        for model in models:
            sizes = self.sizes(model)
            layers = self.parameters(sizes)
            for count in tokens:
                h = self.hidden(sizes, count)
                jitted = {name: self.program(sizes, *how) for name, how in chosen.items()}
                jitted["reference"] = self.reference(sizes)
                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    programs = {
                        name: common.start(pool, functools.partial(program.lower, h, layers))
                        for name, program in jitted.items()
                    }
                want = run(programs["reference"], h, layers)
                for name in chosen:
                    call = functools.partial(run, programs[name], h, layers)
                    row: dict[str, Any] = {
                        "model": model,
                        "tokens": count,
                        "implementation": name,
                        "flag_set": self.flag_set,
                    }
                    try:
                        out = call()
                        if name != "matmuls alone":
                            row["relative_error"] = common.relative_error(out, want)
                            row["matches"] = row["relative_error"] <= BOUND
                    except Exception as error:
                        row |= common.failure(error)
                    yield row, call

    def facts(self) -> dict[str, Any]:
        models, tokens = self.arguments.models, self.arguments.tokens
        bandwidth = common.copy_bandwidth(self.mesh)
        weights = {name: self.sizes(name).weight_bytes() / self.mesh.size for name in models}
        return {
            "layers": self.layers,
            "timings": len(models) * len(tokens) * len(self.implementations()),
            "bandwidth": bandwidth,
            "weights_us": {name: size / bandwidth * 1e6 for name, size in weights.items()},
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        models, tokens = self.arguments.models, self.arguments.tokens
        for row, call in self.cases(models, tokens, self.implementations()):
            if "error" not in row:
                row["layer_us"] = self.clock.microseconds(call, self.layers)
                if row["implementation"].startswith("fused") and self.mode == "mesh":
                    row["gap_us"] = xplane.gap_microseconds(call, "fused tail")
            yield row


def run(program: concurrent.futures.Future, *operands: Any) -> Any:
    """Calls the compiled program that a future holds."""
    return program.result()(*operands)


def project_ranks(x: jax.Array, w: jax.Array, *, ranks: int) -> jax.Array:
    """x @ w as the partial sums of all ranks, [N, tokens, D]."""
    x = x.reshape(len(x), ranks, -1)
    return jnp.einsum("tnf,nfd->ntd", x, w.reshape(ranks, -1, w.shape[1]))


def loopback_post_ff(x, *others):
    """Returns rank 0's result."""
    return loopback.loopback_post_ff(x, *others)[0]


def loopback_sandwich(x, residual, norm_scale, scalar=None, *, next_norm_scale):
    """Returns rank 0's result."""
    scalar = None if scalar is None else jnp.asarray(scalar)
    operands = Operands((x,), (norm_scale,), residual, scalar, (next_norm_scale,))
    hidden, normed = loopback.loopback_tail(operands)
    return hidden[0], normed[0]


def add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers", type=common.positive_integer, help="default: 8; with --quick 4; on a CPU 2"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times Gemma 4 blocks, psum and fused.")
    common.add_arguments(parser, child_seconds=240)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all")
    parser.add_argument(
        "--tokens", type=common.positive_integer, nargs="+", help=f"default: {TOKENS}"
    )
    add_layers(parser)
    parser.add_argument("--flag-sets", nargs="+", choices=common.FLAG_SETS, default=None)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.models = arguments.models or (["31B"] if quick else list(MODELS))
    arguments.tokens = arguments.tokens or (QUICK_TOKENS if quick else TOKENS)
    if common.in_child(arguments):
        common.work(Bench, arguments)
        return
    flag_sets = arguments.flag_sets or (["A", "C"] if quick else list(common.FLAG_SETS))
    content = common.run_children(
        flag_sets, arguments, "{implementation}, {model}, {tokens} tokens"
    )
    report.finish("block", content, arguments.out)


if __name__ == "__main__":
    main()
