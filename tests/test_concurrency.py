"""Programs that share workspaces: each way in which JAX runs a call, several functions, models and
meshes in turn, and several threads. In loopback and over a mesh of GPUs; all results must be the
first, oracle-checked ones, bit for bit."""

import dataclasses
import functools
import threading
from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gemma_arf as jga
from helpers import children
from helpers.cases import F32, Case, Inputs, assert_matches, make_inputs
from helpers.places import GRAPHS, NO_GRAPHS, Place, gpu_mesh, same_bits
from helpers.runners import make_mesh
from jax_gemma_arf._src import lowering

NO_LOCK = nullcontext()
STEPS = 6
# Each step's output is the next one's residual.
DECODE = Case((4,), 2560, op="sandwich", next_norms=1)

jax.export.register_namedtuple_serialization(Inputs, serialized_name="cases.Inputs")
CUSTOM_CALLS = [
    jax.export.DisabledSafetyCheck.custom_call(target)
    for target in (lowering.TARGET_NAME, lowering.LOOPBACK_TARGET)
]


def unrolled(step, inputs):
    for _ in range(STEPS):
        inputs = step(inputs)
    return inputs


def scanned(step, inputs):
    return jax.lax.scan(lambda state, _: (step(state), None), inputs, length=STEPS)[0]


def while_looped(step, inputs):
    def body(state):
        return state[0] + 1, step(state[1])

    return jax.lax.while_loop(lambda state: state[0] < STEPS, body, (0, inputs))[1]


def jitted(**options):
    def prepare(function, _):
        return jax.jit(function, compiler_options=options)

    return prepare


def ahead_of_time(function, inputs):
    return jax.jit(function).lower(inputs).compile()


def exported(function, inputs):
    blob = jax.export.export(jax.jit(function), disabled_checks=CUSTOM_CALLS)(inputs).serialize()
    return jax.jit(jax.export.deserialize(blob).call)


def donated(function, _):
    call = jax.jit(function, donate_argnums=0)

    def copy_and_call(inputs):
        return call(jax.tree.map(jnp.copy, inputs))

    return copy_and_call


PROGRAMS = {
    "jit": (unrolled, jitted()),
    "no_graphs": (unrolled, jitted(**NO_GRAPHS)),
    "graphs": (unrolled, jitted(**GRAPHS)),
    "latency_hiding": (unrolled, jitted(xla_gpu_enable_latency_hiding_scheduler=True)),
    "aot": (unrolled, ahead_of_time),
    "export": (unrolled, exported),
    "donated": (unrolled, donated),
    "scan": (scanned, jitted()),
    "scan_no_graphs": (scanned, jitted(**NO_GRAPHS)),
    "while": (while_looped, jitted()),
}


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(where, name):
    """Hazards 9 and 13: however JAX compiles a decode loop, and at every run of it (the first is
    eager, the second captured, the others replayed), it is the steps one by one."""
    body, prepare = PROGRAMS[name]
    step = functools.partial(where.step, DECODE)
    inputs = where.inputs(DECODE)
    one_step = jax.jit(where.program(DECODE, step))
    want = inputs
    for _ in range(STEPS):
        want = want._replace(residual=one_step(want))
    call = prepare(where.program(DECODE, functools.partial(body, step)), inputs)
    for _ in range(4):
        same_bits(call(inputs), want.residual)


def addresses(array: jax.Array) -> tuple[int, ...]:
    """Returns the address of an array's part on each device."""
    return tuple(shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards)


@pytest.mark.parametrize("options", [{}, GRAPHS], ids=["jit", "graphs"])
def test_moving_buffers(where, options):
    """Hazards 13 and 28: a decode loop whose residual is donated, with all of its buffers somewhere
    else every few runs. What lies where they were is other data, and is kept: a graph that still
    read there would compute something else, one that still wrote there would spoil it."""
    step = functools.partial(where.step, DECODE)
    program = where.program(DECODE, functools.partial(unrolled, step))

    def decode(residual, inputs):
        return program(inputs._replace(residual=residual))

    in_place = jax.jit(decode, donate_argnums=0, compiler_options=options)
    eager = jax.jit(decode, compiler_options=NO_GRAPHS)
    runs, kept = 3, []
    start = where.inputs(DECODE).residual
    got = want = start
    for seed in range(8):
        inputs = where.inputs(dataclasses.replace(DECODE, seed=seed))
        got = jnp.copy(got)  # that before is the result of the last runs, and stays
        where_it_is = addresses(got)
        for _ in range(runs):
            donated, got = got, in_place(got, inputs)
            want = eager(want, inputs)
            assert donated.is_deleted()
            assert addresses(got) == where_it_is
        kept.append((inputs, got, want))
    for array_of_each in zip(*(jax.tree.leaves((inputs, got)) for inputs, got, _ in kept)):
        assert len(set(map(addresses, array_of_each))) == len(kept)
    for seed, (inputs, got, want) in enumerate(kept):
        same_bits(got, want)
        same_bits(inputs, where.inputs(dataclasses.replace(DECODE, seed=seed)))


def in_turn(
    programs, rounds: int, seed: int = 0, dispatch: AbstractContextManager = NO_LOCK
) -> None:
    """Checks every (place, case) against the oracle, then all of them in random order against
    that. dispatch: held while a call is dispatched."""
    calls = []
    for place_, case in programs:
        inputs = place_.inputs(case)
        call = jax.jit(place_.call(case))
        with dispatch:
            first = call(inputs)
        outputs = [np.asarray(out)[0] for out in first]
        assert_matches(case, make_inputs(case, place_.ranks), outputs, exact_sum=True)
        calls.append((call, inputs, first))
    order = np.random.default_rng(seed).integers(len(calls), size=rounds)
    pending = []
    for call, inputs, first in (calls[i] for i in order):
        with dispatch:
            pending.append((call(inputs), first))
    for outputs, first in pending:
        same_bits(outputs, first)


SAME_SIZE = [Case((8,), 2560), Case((8,), 2560, op="sandwich", next_norms=2)]
TWO_MODELS = [Case((8,), 640), Case((8,), 5376), Case((300,), 640), Case((300,), 5376, F32)]


@pytest.mark.parametrize("cases", [SAME_SIZE, TWO_MODELS], ids=["same_size", "two_models"])
def test_functions_in_turn(where, cases):
    """Hazards 8, 14 and 15: functions that share a workspace, and models of other widths."""
    in_turn([(where, case) for case in cases], rounds=200)


def test_meshes_in_turn_loopback(built, require_gpus):
    """Hazards 7 and 8: groups of other sizes on one device."""
    require_gpus(1)
    in_turn([(Place(ranks), case) for ranks in (2, 4, 8) for case in SAME_SIZE], rounds=200)


def test_meshes_in_turn_multi_gpu(built, require_gpus):
    """Hazards 7 and 8: meshes that put the same devices into groups in another order."""
    devices = require_gpus(2)
    meshes = [
        gpu_mesh(devices),
        gpu_mesh(devices[::-1]),
        make_mesh((1, 2), ("data", "tp"), devices),
    ]
    in_turn([(Place(2, mesh), case) for mesh in meshes for case in SAME_SIZE], rounds=200)


def from_threads(kind: str, ranks: int) -> None:
    jga.set_peer_timeout(10)
    mesh = gpu_mesh(jax.devices("cuda")[:ranks]) if kind == "multi_gpu" else None
    programs = [(Place(ranks, mesh), case) for case in TWO_MODELS]
    dispatch = NO_LOCK if mesh is None else threading.Lock()
    failures = []

    def work(seed: int) -> None:
        try:
            in_turn(programs, rounds=100, seed=seed, dispatch=dispatch)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    # Threads that came at the same time share what one of them made.
    parts = [(p.device, p.rank, p.algorithm, p.capacity) for p in jga.workspaces()]
    assert len(parts) == len(set(parts))
    print("right")


@pytest.mark.parametrize(("kind", "ranks"), [("loopback", 2), ("loopback", 4), ("multi_gpu", 2)])
def test_threads(built, require_gpus, kind, ranks):
    """Hazard 9: several Python threads have calls in flight on the same devices.

    Over a mesh all devices must get programs in one order, whatever collectives are in them, so the
    threads take turns to dispatch. In loopback they do not, but the ranks' streams are shared, so
    XLA must let one run at a time have the device.
    """
    require_gpus(ranks if kind == "multi_gpu" else 1)
    env = {"XLA_FLAGS": "--xla_gpu_require_exclusive_lock=true"} if kind == "loopback" else {}
    ended = children.run(from_threads, kind, ranks, seconds=90, env=env)
    assert ended.check().stdout == "right\n"
