"""Long runs: random calls in random order over shared workspaces, checked bit for bit.

    python tests/stress.py --ranks 2 --calls 1000000      all ranks on one GPU
    python tests/stress.py --mesh --seconds 60            over all devices, one rank each

A program holds a few random cases (operation, D, tokens, dtypes, algorithm), each with several sets
of inputs. Its first results are checked against the float64 oracle; then a loop on the device calls
them in a random order, with CUDA graphs in every other program, and counts the calls in which any
bit on any rank differs from the first result. Exits with 1 after the first run of a program with
such a call, naming the case; with 0 after --calls calls or --seconds seconds.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jax_gemma_arf as jga
from helpers.cases import (
    BF16,
    F16,
    F32,
    GEMMA_WIDTHS,
    OPS,
    Case,
    Inputs,
    assert_matches,
    make_inputs,
)
from helpers.places import bits_differ
from helpers.runners import ONE_MESSAGE_OPS, call_op, in_specs, make_mesh, one_rank, place
from jax_gemma_arf._src import decision
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_tail

TOKENS = (1, 2, 3, 7, 16, 33, 64, 130)
# Of inputs a case. An iteration calls it once on each of them: XLA would merge equal calls.
SETS = 3


@dataclasses.dataclass(frozen=True)
class Call:
    """A case and the algorithm that runs it; str() says what failed."""

    case: Case
    algorithm: str

    def __str__(self) -> str:
        return f"{self.algorithm} {self.case} (seed {self.case.seed})"


def random_call(rng: np.random.Generator, ops: tuple[str, ...]) -> Call:
    op = str(rng.choice(ops))
    least = {"sandwich": 1, "moe_tail": 0}.get(op)
    half = [BF16, F16][rng.integers(2)]
    dtype, residual_dtype, scale_dtype = ([half, half, F32][i] for i in rng.integers(3, size=3))
    case = Case(
        leading=(int(rng.choice(TOKENS)),),
        width=int(rng.choice(GEMMA_WIDTHS)),
        dtype=dtype,
        residual_dtype=residual_dtype,
        scale_dtype=scale_dtype,
        seed=int(rng.integers(2**20)),
        op=op,
        next_norms=0 if least is None else int(rng.integers(least, 4)),
    )
    return Call(case, str(rng.choice(["one_shot", "two_shot"])))


def make_sets(case: Case, ranks: int) -> list[Inputs]:
    """Inputs that differ in all but the scales, which the sets share."""
    first, *others = (
        make_inputs(dataclasses.replace(case, seed=case.seed + i), ranks) for i in range(SETS)
    )
    changed = {"partial_sums", "residual"}
    return [first] + [
        first._replace(**{name: getattr(other, name) for name in changed}) for other in others
    ]


class Backend:
    """Where a program runs: all ranks on one device, or a mesh with one on each."""

    def __init__(
        self, ranks: int, mesh: jax.sharding.Mesh | None, seed: int, implementation: str = "cuda"
    ):
        self.ranks, self.mesh, self.implementation = ranks, mesh, implementation
        self.ops = ONE_MESSAGE_OPS if implementation == "flashinfer" else OPS
        self.on_gpus = mesh is None or mesh.devices.flat[0].platform == "gpu"
        self._algorithms = np.random.default_rng(seed)

    def outputs(self, call: Call, inputs: Inputs) -> tuple[jax.Array, ...]:
        """Returns the ranks' results: [N, tokens, D] in loopback, or one rank's."""
        case = call.case
        options: dict[str, Any] = {"eps": case.eps, "scale_offset": case.scale_offset}
        if self.mesh is None:
            options |= {"algorithm": call.algorithm, "implementation": self.implementation}
            return loopback_tail(Operands(*inputs), **options)
        options["implementation"] = self.implementation if self.on_gpus else None
        return call_op(case, one_rank(inputs), axis_name="tp", **options)

    def jit(self, function: Callable, in_specs, out_specs, *, graphs: bool) -> Callable:
        """jit of a function of one program's ranks, with CUDA graphs or without."""
        if self.mesh is not None:
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
        options = {"xla_gpu_enable_command_buffer": ""} if self.on_gpus and not graphs else {}
        return jax.jit(function, compiler_options=options)

    def random_algorithms(self):
        """A mesh's lowerings choose at random rather than by size."""

        def choose(*_: object) -> str:
            return str(self._algorithms.choice(["one_shot", "two_shot"]))

        return mock.patch.object(decision, "choose_algorithm", choose)

    def place(self, value, specs):
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, value)
        return place(self.mesh, value, specs)


def stack(sets: list[Inputs]) -> Inputs:
    """The sets of a case along a new first axis of what differs."""
    return sets[0]._replace(
        partial_sums=jax.tree.map(lambda *x: np.stack(x), *(s.partial_sums for s in sets)),
        residual=None if sets[0].residual is None else np.stack([s.residual for s in sets]),
    )


def pick(stacked: Inputs, index) -> Inputs:
    """One of the sets; index may be traced."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
    return stacked._replace(
        partial_sums=tuple(map(take, stacked.partial_sums)),
        residual=None if stacked.residual is None else take(stacked.residual),
    )


class Program:
    """A few cases and a loop on the device over them."""

    def __init__(
        self,
        backend: Backend,
        rng: np.random.Generator,
        *,
        cases: int,
        graphs: bool,
    ):
        self.calls = [random_call(rng, backend.ops) for _ in range(cases)]
        pairs = [(case, first) for case in range(cases) for first in range(SETS)]
        order = [pairs[i] for i in rng.permutation(len(pairs))]
        sets = [make_sets(call.case, backend.ranks) for call in self.calls]
        specs = [in_specs(call.case, P(None, "tp")) for call in self.calls]
        stacked = backend.place([stack(each) for each in sets], specs)

        def first(stacked):
            outputs = [
                [backend.outputs(call, pick(inputs, i)) for i in range(SETS)]
                for call, inputs in zip(self.calls, stacked)
            ]
            return outputs if backend.mesh is None else jax.tree.map(lambda a: a[None], outputs)

        with backend.random_algorithms():
            every_rank = backend.jit(first, (specs,), P("tp"), graphs=graphs)(stacked)
        expected = self._checked(sets, jax.device_get(every_rank), exact_sum=backend.on_gpus)
        everywhere = jax.tree.map(lambda _: P(), expected)
        self.operands = stacked, backend.place(expected, everywhere)

        def loop(operands, start, trips):
            stacked, expected = operands

            def iteration(trip, wrong):
                for which, first_set in order:
                    index = (trip + first_set) % SETS
                    outputs = backend.outputs(self.calls[which], pick(stacked[which], index))
                    differ = [
                        bits_differ(out, jax.lax.dynamic_index_in_dim(want, index, keepdims=False))
                        for out, want in zip(outputs, expected[which])
                    ]
                    wrong = wrong.at[which].add(functools.reduce(jnp.logical_or, differ))
                return wrong

            wrong = jnp.zeros(len(self.calls), jnp.int32)
            wrong = jax.lax.fori_loop(start, start + trips, iteration, wrong)
            return wrong if backend.mesh is None else jax.lax.psum(wrong, "tp")

        self._calls_a_trip = len(order)
        self._loop = backend.jit(loop, ((specs, everywhere), P(), P()), P(), graphs=graphs)
        with backend.random_algorithms():
            self.run(0, 1)

    def _checked(self, sets, every_rank, *, exact_sum: bool):
        """The first results, stacked by sets, once every rank holds what the oracle says."""
        expected = []
        for call, of_sets, outputs_of_sets in zip(self.calls, sets, every_rank):
            for inputs, outputs in zip(of_sets, outputs_of_sets):
                for out in outputs:
                    same = out.view(np.uint8) == out[:1].view(np.uint8)
                    assert same.all(), f"{call}: ranks hold different bits"
                first = [out[0] for out in outputs]
                assert_matches(call.case, inputs, first, exact_sum=exact_sum)
            expected.append(
                tuple(np.stack([out[0] for out in outputs]) for outputs in zip(*outputs_of_sets))
            )
        return expected

    def run(self, start: int, trips: int) -> int:
        """Goes around so often. Returns the number of calls; SystemExit names those that differ."""
        wrong = np.asarray(self._loop(self.operands, start, trips))
        if wrong.any():
            lines = [f"{n} times: {call}" for n, call in zip(wrong, self.calls) if n]
            raise SystemExit("results that differ from the first ones\n" + "\n".join(lines))
        return trips * self._calls_a_trip


def sound_workspaces() -> list[jga.Workspace]:
    """All workspaces, none of them damaged."""
    parts = jga.workspaces()
    for part in parts:
        if part.damage:
            raise SystemExit(f"damage: {part}")
    return parts


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, help="2, 4 or 8; with --mesh all devices by default")
    parser.add_argument("--mesh", action="store_true", help="one rank a device")
    parser.add_argument("--implementation", choices=("cuda", "flashinfer"), default="cuda")
    parser.add_argument(
        "--calls",
        type=int,
        default=1_000_000,
        help="end after at least this number of calls, or ...",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="... for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", type=int, default=6, help="two compilations each")
    parser.add_argument("--cases", type=int, default=8, help="in each program")
    parser.add_argument("--trips", type=int, default=100, help="around the cases in one run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    mesh = None
    ranks = options.ranks or 2
    if options.mesh:
        devices = jax.devices()
        ranks = options.ranks or len(devices)
        mesh = make_mesh((ranks,), ("tp",), devices[:ranks])
    rng = np.random.default_rng(options.seed)
    backend = Backend(ranks, mesh, options.seed, options.implementation)
    bar = {"dynamic_ncols": True, "disable": None}
    programs = [
        Program(backend, rng, cases=options.cases, graphs=i % 2 == 0)
        for i in tqdm(range(options.programs), desc="warm-up", unit=" programs", **bar)
    ]
    before = sound_workspaces()

    done, trips = 0, 0
    start = time.monotonic()
    with tqdm(total=options.calls, unit=" calls", unit_scale=True, **bar) as progress:
        while done < options.calls and time.monotonic() - start < options.seconds:
            program = programs[rng.integers(len(programs))]
            calls = program.run(trips, options.trips)
            trips += options.trips
            done += calls
            progress.update(calls)
    seconds = time.monotonic() - start

    if sound_workspaces() != before:
        raise SystemExit("workspaces were added or went after the warm-up")
    where = f"{ranks} {'devices' if options.mesh else 'ranks on one device'}"
    print(f"{done} calls on {where}, no bit differs, {done / seconds:.0f} calls/s")


if __name__ == "__main__":
    main()
