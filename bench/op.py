"""Times the fused operations against every rival, over Gemma 4's widths and many token counts.

Rivals: psum + tail as XLA compiles it, under each of common.FLAG_SETS in a process of its own;
FlashInfer's kernels with our epilogue (implementation="flashinfer", where it was built);
FlashInfer's fused all-reduce + norm with the rest of the tail in XLA (this project's first design);
and two floors, FlashInfer's all-reduce alone and the wire: pushing the bytes that any all-reduce
must send, both ways at once. Not here: a Pallas multimem all-reduce, since NVLink multicast, on
which it rests, is left off; FlashInfer's torch path, whose kernels are those measured.

Two columns, both microseconds a call, from chains of dependent calls in one jit, in bfloat16:

  wall    wall time of the chain over its length; caches are flushed between chains, and each call
          has a residual and scales of its own, so that they come from memory. Median and half the
          interquartile range.
  kernel  from a profile of the same chain: time in which a kernel ran, on the rank that is busy
          least (a kernel that waits for its peer is busy). Not in loopback: under the profiler the
          parallel branches of a graph can run one after the other, and the ranks never finish.

The operation second_norm is what a next norm costs: fused_post_ff, and fused_sandwich with its
normed result left alone, in chains that are otherwise the same, long enough for the host not to
matter, and timed in turn.

Every timed chain is compared with the definition in float32 (reference.tail). On one GPU all ranks
share it (loopback: no wire, no psum), on a CPU only psum + tail runs; both are for trying the
benchmark out.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import common
import jax
import jax.numpy as jnp
import numpy as np
import report
import rivals
import thresholds
import xplane
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from jax_gemma_arf.__main__ import GEMMA4_WIDTHS as WIDTHS
from jax_gemma_arf._src import decision, extension
from jax_gemma_arf._src.operands import AXIS_SIZES, TWO_BRANCHES, Operands
from jax_gemma_arf._src.reference import tail
from jax_gemma_arf.loopback import loopback_tail

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_TOKENS = (1, 64, 1024)
#: Most with which second_norm is timed: above, it is small beside the rest.
SECOND_NORM_TOKENS = 128
SCALAR = np.float32(0.5)
#: Of a row after a chain of bfloat16 steps: what 50 roundings add up to is half of that.
BOUND = 2**-5

State = tuple[jax.Array, ...]


class Cold(NamedTuple):
    """Operands of one call besides the partial sums; no other call of the chain reads them."""

    residual: jax.Array  # [tokens, D]
    scales: tuple[jax.Array, ...]  # four times [D]


class Op(NamedTuple):
    """A fused operation as a link of a chain.

    link: (call, state, cold) -> the next link's state. It must hold all outputs of the call, lest
    XLA leave one out, and no array twice, lest XLA reduce it once. oracle: the call in float32,
    with the partial sums of all ranks, [N, tokens, D]. varying: for each array of the state,
    whether it is partial sums or else the same on all ranks.
    """

    link: Callable[[Callable[..., Any], State, Cold], State]
    oracle: Callable[..., Any]
    varying: tuple[bool, ...]


def post_ff_link(call, state, cold):
    (x,) = state
    return (call(x, cold.residual, cold.scales[0], SCALAR),)


def second_norm_link(call, state, cold):
    """Links like post_ff_link. Nothing reads normed; the kernel writes it all the same."""
    x, *_ = state
    return call(x, cold.residual, cold.scales[0], SCALAR, next_norm_scale=cold.scales[1])


def sandwich_link(call, state, cold):
    x, hidden = state
    hidden, normed = call(x, hidden, cold.scales[0], SCALAR, next_norm_scale=cold.scales[1])
    return normed, hidden


def sandwich_link_in_loopback(call, state, cold):
    """There hidden is [N, tokens, D], which is no residual."""
    (x,) = state
    return call(x, cold.residual, cold.scales[0], SCALAR, next_norm_scale=cold.scales[1])[1:]


def all_reduce_norm_link(call, state, cold):
    (x,) = state
    return (call(x, cold.scales[0]),)


def moe_tail_link(call, state, cold):
    names = (*TWO_BRANCHES.scales, "next_norm_scale")
    return call(*state, cold.residual, SCALAR, **dict(zip(names, cold.scales)))


OPERANDS = {
    "post_ff": lambda x, residual, scale, scalar: Operands((x,), (scale,), residual, scalar),
    "sandwich": lambda x, residual, scale, scalar, next_norm_scale: Operands(
        (x,), (scale,), residual, scalar, (next_norm_scale,)
    ),
    "all_reduce_norm": lambda x, scale: Operands((x,), (scale,)),
    "moe_tail": lambda dense, experts, residual, scalar, *, next_norm_scale, **scales: Operands(
        (dense, experts),
        tuple(scales[name] for name in TWO_BRANCHES.scales),
        residual,
        scalar,
        (next_norm_scale,),
    ),
}


def returned(results: State) -> Any:
    """Returns (hidden, *normed) as a public operation does: hidden alone without next norms."""
    hidden, *normed = results
    return results if normed else hidden


def oracle(op: str) -> Callable[..., Any]:
    """The library's own definition of a fused operation, for the partial sums of all ranks."""

    def call(*arrays, **scales):
        operands = OPERANDS[op](*arrays, **scales)
        rows = tuple(jnp.broadcast_to(common.rank_sum(x), x.shape) for x in operands.partial_sums)
        return returned(tail(operands._replace(partial_sums=rows), eps=1e-6, scale_offset=0.0))

    return call


OPS = {
    "post_ff": Op(post_ff_link, oracle("post_ff"), (True,)),
    "sandwich": Op(sandwich_link, oracle("sandwich"), (True, False)),
    "all_reduce_norm": Op(all_reduce_norm_link, oracle("all_reduce_norm"), (True,)),
    "moe_tail": Op(moe_tail_link, oracle("moe_tail"), (True, True)),
    "second_norm": Op(second_norm_link, oracle("sandwich"), (True,)),
}
LOOPBACK_OPS = OPS | {"sandwich": Op(sandwich_link_in_loopback, oracle("sandwich"), (True,))}


def loopback_call(
    op: str,
    *arrays,
    algorithm: str | None = None,
    implementation: str = "cuda",
    **scales,
):
    """A fused operation with the partial sums of all ranks, [N, tokens, D], on one GPU."""
    options = {"algorithm": algorithm, "implementation": implementation}
    return returned(loopback_tail(OPERANDS[op](*arrays, **scales), **options))


class Config(NamedTuple):
    """One line of the table. colds: how many calls have operands of their own; rounds: how many
    times the chain goes through them."""

    op: str
    width: int
    tokens: int
    colds: int
    rounds: int

    @property
    def links(self) -> int:
        """The length of the chain."""
        return self.colds * self.rounds

    @property
    def message_bytes(self) -> int:
        """Bytes of one partial sum on one rank."""
        return 2 * self.tokens * self.width


class Contender(NamedTuple):
    """body: (state, colds) -> state, on one rank of a mesh or on all in loopback.

    name: as in the table; oracle: (state, stacked Cold) -> state, None for a contender that is
    checked otherwise; lowering: a context in which to lower it.
    """

    name: str
    body: Callable[[State, list[Cold]], State]
    oracle: Callable[[State, Cold], State] | None
    lowering: Callable[[], Any] = contextlib.nullcontext


def chain(link, call, rounds: int = 1) -> Callable[[State, list[Cold]], State]:
    """Calls in a row, each on what the one before it returned."""

    step = jax.jit(functools.partial(link, call))  # traced once, inlined by XLA

    def body(state, colds):
        for cold in colds * rounds:
            state = step(state, cold)
        return state

    return body


def oracle_chain(link, call, rounds: int = 1) -> Callable[[State, Cold], State]:
    """The same as one loop, but for the first call, whose state may lack what only calls return."""

    def body(state, stacked):
        colds = len(stacked.residual)
        return jax.lax.fori_loop(
            1,
            colds * rounds,
            lambda k, state: tuple(link(call, state, pick(stacked, k % colds))),
            tuple(link(call, state, pick(stacked, 0))),
        )

    return body


class Bench(common.Bench):
    """The devices, how a chain becomes a program on them, and who contends."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.ops = LOOPBACK_OPS if self.mode == "loopback" else OPS
        self.clock = common.Clock(self.mesh, 5 if arguments.quick else arguments.repeats)
        self.algorithms = arguments.algorithms
        self.configs = list(self._configs(arguments))
        self.rivals = self._load_rivals()

    def _load_rivals(self) -> str:
        """ "built", or why there are no rivals."""
        if self.mode == "cpu" or self.flag_set != "A" or self.ranks not in AXIS_SIZES:
            return "not wanted"
        if rivals.load() is None:
            return "not built: make bench-rivals"
        ordinals = [d.local_hardware_id for d in self.devices]
        ordinals *= self.ranks // len(self.devices)
        try:
            rivals.create(ordinals, max(config.message_bytes for config in self.configs))
        except RuntimeError as error:
            return f"not started: {error}"
        return "built"

    def _configs(self, arguments) -> Iterator[Config]:
        for op, width, tokens in itertools.product(
            arguments.ops, arguments.hidden, arguments.tokens
        ):
            colds = 4 if self.mode == "cpu" else 50
            if 2 * tokens * width > 4 << 20:
                colds = min(colds, 16 if 2 * tokens * width <= 32 << 20 else 8)
            rounds = 1
            if op == "second_norm":
                if self.mode == "cpu" or self.flag_set != "A" or tokens > SECOND_NORM_TOKENS:
                    continue
                rounds = 4
            yield Config(op, width, tokens, colds, rounds)

    def fused(self, op: str) -> Callable:
        """The call of a fused operation."""
        if self.mode == "loopback":
            return functools.partial(loopback_call, op)
        call = getattr(jga, f"fused_{op}")
        return functools.partial(call, axis_name="tp", implementation="cuda")

    def contenders(self, config: Config) -> Iterator[Contender]:
        """In the order in which they are timed; the second time around comes by itself."""
        if config.op == "second_norm":
            for op, as_op in (("post_ff", "post_ff"), ("sandwich", "second_norm")):
                link, oracle, _ = self.ops[as_op]
                body = chain(link, self.fused(op), config.rounds)
                yield Contender(f"fused_{op}", body, oracle_chain(link, oracle, config.rounds))
            return
        link, oracle, _ = self.ops[config.op]
        want = oracle_chain(link, oracle)
        fused = self.fused(config.op)
        kernels = [Contender("fused", chain(link, fused), want)]
        if config.op != "moe_tail" and extension.load("flashinfer") is not None:
            by_flashinfer = functools.partial(fused, implementation="flashinfer")
            kernels.append(Contender("fused flashinfer", chain(link, by_flashinfer), want))
        if self.mode == "loopback":
            yield Contender("sum", chain(link, oracle), want)
            yield from kernels
            for algorithm in self.algorithms:
                forced = functools.partial(fused, algorithm=algorithm)
                yield Contender(f"fused {algorithm}", chain(link, forced), want)
        else:
            psum = functools.partial(fused, implementation="xla")
            yield Contender("psum", chain(link, psum), want)
            if self.mode == "cpu" or self.flag_set != "A":
                return
            yield from kernels
            for name in self.algorithms:
                force = functools.partial(
                    mock.patch.object, decision, "choose_algorithm", lambda *_, name=name: name
                )
                yield Contender(f"fused {name}", chain(link, fused), want, force)
        if config.op == "post_ff" and self.rivals == "built":
            yield from self._rivals(config, want)

    def again(self, names: Iterable[str]) -> list[str]:
        """Returns the timings to repeat at the end, which show what a difference is worth."""
        twice = ("fused", "psum") if self.flag_set == "A" else ()
        return [f"{name} again" for name in names if name in twice]

    def _rivals(self, config: Config, want) -> Iterator[Contender]:
        ranks = self.ranks

        def norm_then_tail(x, residual, norm_scale, layer_scalar):
            zeros = jnp.zeros_like(residual)  # norm, then add: FlashInfer would add, then norm
            normed = rivals.all_reduce_norm(x, zeros, norm_scale, ranks=ranks)
            out = (normed.astype(jnp.float32) + residual) * layer_scalar
            return out.astype(residual.dtype)

        yield Contender("flashinfer norm + tail", chain(post_ff_link, norm_then_tail), want)

        # Every link multiplies by the number of ranks, and bfloat16 must hold that.
        small = float(ranks) ** -(config.links / 2)

        def sums(state, colds):
            (x,) = state
            x = x * jnp.asarray(small, x.dtype)
            for _ in colds:
                x = rivals.all_reduce(x, ranks=ranks)
            return (x,)

        def want_sums(state, stacked):
            del stacked
            (x,) = state
            x = x * jnp.asarray(small, x.dtype)
            x = jnp.broadcast_to(common.rank_sum(x), x.shape).astype(jnp.float32)
            return (x * float(ranks) ** (config.links - 1),)

        yield Contender("flashinfer all-reduce", sums, want_sums)

        def pushes(state, colds):
            (x,) = state
            for _ in colds:
                x = rivals.wire(x, ranks=ranks)
            return (x,)

        if self.mode == "mesh":
            yield Contender("wire", pushes, None)

    def generator(self, config: Config):
        """Jitted: key -> the first state, and what all links read, stacked."""

        def make(key):
            keys = jax.random.split(key, 3)
            shape = (config.tokens, config.width)
            varying = self.ops[config.op].varying
            state = jax.random.normal(keys[0], (len(varying), self.ranks, *shape), jnp.bfloat16)
            state = [
                x if varies else jnp.broadcast_to(x[0], x.shape)
                for x, varies in zip(state, varying)
            ]
            residual = jax.random.normal(keys[1], (config.colds, *shape), jnp.bfloat16)
            scales = jax.random.normal(keys[2], (4, config.colds, config.width), jnp.bfloat16)
            return tuple(state), Cold(residual, tuple(1 + scales / 8))

        return jax.jit(make, out_shardings=(self._sharding(P("tp")), self._sharding(P())))

    def _sharding(self, spec: P) -> jax.NamedSharding:
        return jax.NamedSharding(self.mesh, spec if self.mode != "loopback" else P())

    def program(self, body):
        """Jitted, over global arrays [N, ...]."""
        if self.mode == "loopback":
            return jax.jit(body)

        def local(state, colds):
            return tuple(x[None] for x in body(tuple(x[0] for x in state), colds))

        specs = (P("tp"), P())
        return jax.jit(
            jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=P("tp"), check_vma=False)
        )

    def abstract(self, config: Config) -> tuple[State, Cold, Cold]:
        """Shapes and shardings of the first state, of all cold operands stacked, and of one."""

        def place(tree, spec, leading=0):
            sharding = self._sharding(spec)
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape[leading:], a.dtype, sharding=sharding), tree
            )

        state, stacked = jax.eval_shape(self.generator(config), random_key())
        return place(state, P("tp")), place(stacked, P()), place(stacked, P(), leading=1)

    def lower(
        self, config: Config, contender: Contender, platforms: tuple[str, ...] | None = None
    ) -> jax.stages.Lowered:
        """For operands that need not be there yet; for these devices, or for other platforms."""
        state, _, cold = self.abstract(config)
        with contender.lowering():
            traced = self.program(contender.body).trace(state, [cold] * config.colds)
            return traced.lower(lowering_platforms=platforms)

    def compile(self, config: Config, pool: concurrent.futures.Executor) -> "Line":
        """Starts to compile all that a line of the table runs."""
        state, stacked, _ = self.abstract(config)
        contenders = list(self.contenders(config))
        oracles = {c.oracle: jax.jit(c.oracle) for c in contenders if c.oracle is not None}
        return Line(
            config,
            contenders,
            {
                c.name: common.start(pool, functools.partial(self.lower, config, c))
                for c in contenders
            },
            {
                oracle: common.start(pool, functools.partial(program.lower, state, stacked))
                for oracle, program in oracles.items()
            },
            common.start(pool, functools.partial(self.generator(config).lower, random_key())),
            common.start(pool, functools.partial(jax.jit(pick).lower, stacked, 0)),
        )

    def check_wire(self, state: State) -> bool:
        """Returns whether each rank received what the next one sent."""
        read = self.program(lambda state, _: (rivals.wire(state[0], ranks=self.ranks, read=True),))
        sent = [
            x.reshape(self.ranks, -1)[:, : 2 * x[0].size // self.ranks]
            for x in (*read(state, []), jnp.roll(state[0], -1, axis=0))
        ]
        return bool(jnp.array_equal(sent[0], sent[1]))

    def measure(self, line: "Line") -> Iterator[dict[str, Any]]:
        """Times the programs of a line and yields their rows."""
        config = line.config
        state, stacked = line.generator.result()(random_key())
        colds = [line.pick.result()(stacked, k) for k in range(config.colds)]
        wanted = {key: program.result()(state, stacked) for key, program in line.oracles.items()}
        contenders = {contender.name: contender for contender in line.contenders}
        names = [*contenders, *self.again(contenders)]
        for turn in [names] if config.op == "second_norm" else [[name] for name in names]:
            what = config._asdict() | {"links": config.links, "flag_set": self.flag_set}
            what["hidden"] = what.pop("width")  # its name in records
            rows: list[dict[str, Any]] = [what | {"implementation": name} for name in turn]
            try:
                calls = []
                for row in rows:
                    contender = contenders[row["implementation"].removesuffix(" again")]
                    program = line.programs[contender.name].result()
                    calls.append(functools.partial(program, state, colds))
                    if contender.oracle is None:
                        row["matches"] = self.check_wire(state)
                    else:
                        want = wanted[contender.oracle]
                        row["row_error"], row["matches"] = compare(calls[-1](), want)
                for row, samples in zip(rows, self.clock.in_turn(calls, config.links)):
                    row["wall_us"] = samples
                if self.mode != "loopback":
                    for row, call in zip(rows, calls):
                        self.clock.flush()
                        row["kernel_us"] = xplane.kernel_microseconds(call, config.links)
            except Exception as error:
                for row in rows:
                    row.update(common.failure(error))
            yield from rows

    def facts(self) -> dict[str, Any]:
        names = [[c.name for c in self.contenders(config)] for config in self.configs]
        return {
            "timings": sum(len(line) + len(self.again(line)) for line in names),
            "extension": extension.why_missing() or "built",
            "flashinfer": getattr(extension.load("flashinfer"), "flashinfer_version", None),
            "rivals": self.rivals,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            lines = [self.compile(config, pool) for config in self.configs]
        while lines:  # all is compiled by now
            yield from self.measure(lines.pop(0))


class Line(NamedTuple):
    """Programs of one line of the table, as futures of compiled programs."""

    config: Config
    contenders: list[Contender]
    programs: dict[str, concurrent.futures.Future]
    oracles: dict[Callable, concurrent.futures.Future]
    generator: concurrent.futures.Future
    pick: concurrent.futures.Future


def random_key() -> jax.Array:
    return jax.random.key(0, impl="rbg")  # which compiles fast


def pick(stacked: Cold, k: int) -> Cold:
    return jax.tree.map(lambda a: a[k], stacked)


@jax.jit
def _compare(out: State, want: State) -> tuple[jax.Array, jax.Array]:
    errors = []
    for pair in zip(out, want):
        got, expected = (array.astype(jnp.float32) for array in pair)
        size = jnp.max(jnp.abs(expected))  # squares must not overflow
        off = jnp.linalg.norm((got - expected) / size, axis=-1)
        errors.append(off / jnp.linalg.norm(expected / size, axis=-1))
    errors = jnp.stack(errors)
    return jnp.max(errors), jnp.all(errors <= BOUND)  # false for NaN, which max may leave out


def compare(out: State, want: State) -> tuple[float, bool]:
    """The largest ||out - want|| / ||want|| of any row, and whether all are within BOUND."""
    error, within = _compare(out, want)
    return float(error), bool(within)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with their defaults filled in."""
    parser = argparse.ArgumentParser(description="Times the fused operations against every rival.")
    common.add_arguments(parser, child_seconds=240)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=None, help="default: all")
    parser.add_argument(
        "--hidden", type=common.positive_integer, nargs="+", help="default: Gemma 4's four widths"
    )
    parser.add_argument(
        "--tokens", type=common.positive_integer, nargs="+", help=f"default: {TOKENS}"
    )
    parser.add_argument("--flag-sets", nargs="+", choices=common.FLAG_SETS, default=None)
    parser.add_argument(
        "--algorithms",
        nargs="+",
        choices=("one_shot", "two_shot"),
        default=[],
        help="time the kernel also with its algorithm forced",
    )
    parser.add_argument(
        "--write-thresholds",
        action="store_true",
        help="time both algorithms, and write the limit of one-shot into the package",
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    if arguments.write_thresholds:
        arguments.algorithms = ["one_shot", "two_shot"]
    arguments.ops = arguments.ops or (["post_ff", "second_norm"] if quick else list(OPS))
    arguments.hidden = arguments.hidden or ([5376] if quick else list(WIDTHS.values()))
    arguments.tokens = arguments.tokens or (QUICK_TOKENS if quick else TOKENS)
    if arguments.flag_sets is None:
        arguments.flag_sets = ["A", "C"] if quick else list(common.FLAG_SETS)
    return arguments


def main() -> None:
    arguments = parse()
    if common.in_child(arguments):
        common.work(Bench, arguments)
        return

    content = common.run_children(
        arguments.flag_sets, arguments, "{implementation}, D {hidden}, {tokens} tokens"
    )
    record = report.finish("op", content, arguments.out)
    if arguments.write_thresholds:
        thresholds.write(record)


if __name__ == "__main__":
    main()
