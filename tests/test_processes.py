"""Jobs of several processes: what they know of each other, one call over all of them, and a peer
that dies."""

import dataclasses
import functools
import os
import re
import signal
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers import children
from helpers.cases import BF16, F32, Case, assert_matches, make_inputs
from helpers.places import GRAPHS, NO_GRAPHS
from helpers.runners import in_specs, make_mesh, mesh_call
from jax_gemma_arf._src import extension, processes
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_tail

CASES = [
    Case((1,), 640),
    Case((33,), 2816, op="sandwich", next_norms=2),
    Case((9,), 5376, F32, op="moe_tail"),
    Case((129,), 2560, op="all_reduce_norm"),
    # Above decision.one_shot_max_bytes(2), so two-shot on a mesh.
    Case((600,), 2816, BF16),
]


def join(coordinator: str, count: int, index: int, local_device_ids=None) -> None:
    """Makes this process one of a job."""
    jax.distributed.initialize(coordinator, count, index, local_device_ids=local_device_ids)


def global_inputs(case: Case, mesh, specs, seed: int):
    """The case's inputs over a mesh of several processes, and all of them as NumPy arrays."""
    inputs = make_inputs(dataclasses.replace(case, seed=seed), mesh.shape["tp"])

    def place(array, spec):
        sharding = jax.NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return inputs, jax.tree.map(place, inputs, specs)


def check_over_mesh(mesh, cases, implementation, *, exact_sum: bool) -> None:
    """Each case over a mesh of ("data", "tp") three times, with other data each time: what this
    process's devices hold, against the oracle."""
    data = mesh.shape["data"]
    for case in cases:
        # data shards of the case's tokens each
        whole = dataclasses.replace(case, leading=(data * case.leading[0],))
        specs = in_specs(whole, P("tp", "data"), P("data"))
        call = jax.jit(
            mesh_call(
                whole,
                mesh,
                specs=specs,
                out_specs=P("tp", "data"),
                every_rank=True,
                implementation=implementation,
            )
        )
        for seed in range(3):
            inputs, placed = global_inputs(whole, mesh, specs, seed)
            outputs = call(placed)
            for shards in zip(*(out.addressable_shards for out in outputs)):
                start, stop, _ = shards[0].index[1].indices(whole.leading[0])
                local = [np.asarray(shard.data)[0] for shard in shards]
                assert_matches(case, inputs.tokens(start, stop), local, exact_sum=exact_sum)


def facts_of(count: int) -> Any:
    """Returns the facts of every process, after jga.initialize()."""
    known = processes.known(count)
    assert known is not None
    return known


# CPUs


def on_cpus(coordinator: str, index: int) -> None:
    join(coordinator, 2, index)
    devices = jax.devices()
    assert [device.process_index for device in devices] == [0, 0, 1, 1]
    tp = make_mesh((1, 4), ("data", "tp"), devices)
    data_tp = make_mesh((2, 2), ("data", "tp"), devices)
    assert processes.known(2) is None
    jga.initialize()
    results = [
        *(jga.fusion_support(s, BF16, mesh=tp, axis_name="tp") for s in ((1, 640), (1, 1000))),
        *facts_of(2),
    ]
    # Processes that disagree would wait for each other here.
    check_over_mesh(tp, CASES[:2], None, exact_sum=False)
    check_over_mesh(data_tp, CASES[:1], None, exact_sum=False)
    # Marked, since threads of Gloo's write to stdout too, in pieces.
    print(*(f"\nresult: {result}" for result in (*results, "right")), flush=True)


def run_job(function, *, seconds: float = 100, **options) -> list[list[str]]:
    """Returns the results that each of two processes has printed."""
    outputs = [
        child.check().stdout for child in children.run_job(function, seconds=seconds, **options)
    ]
    return [re.findall(r"^result: (.*?) *$", text, flags=re.MULTILINE) for text in outputs]


def run_on_cpus(**second_environment):
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return run_job(on_cpus, env=(env, env | second_environment))


def test_two_processes_on_cpus():
    """Both know the same, decide alike, and compute what one would, through psum."""
    first, second = run_on_cpus()
    assert first == second
    assert first[-1] == "right"
    assert "platform is cpu" in first[0]
    assert "D must be a multiple of 64" in first[1]
    assert sum(line.startswith("ProcessFacts(") for line in first) == 2


def test_one_process_switches_all_off():
    """Hazard 11: what one process wants is known to all before any of them decides."""
    first, second = run_on_cpus(JAX_GEMMA_ARF_DISABLE="1")
    assert first == second
    assert first[-1] == "right"
    assert "switched off by JAX_GEMMA_ARF_DISABLE" in first[0]
    assert [line[-12:] for line in first[2:4]] == [" disabled=0)", " disabled=1)"]


def with_other_devices(coordinator: str, index: int) -> None:
    jax.config.update("jax_num_cpu_devices", (1, 3)[index])
    join(coordinator, 2, index)
    mesh = make_mesh((2, 2), ("data", "tp"), jax.devices())
    with jax.set_mesh(mesh), jax.transfer_guard("disallow_explicit"):
        jga.initialize()
    print(*(f"\nresult: {fact}" for fact in facts_of(2)), flush=True)
    support = jga.fusion_support((1, 640), BF16, mesh=mesh, axis_name="tp")
    print(f"\nresult: {support}", flush=True)


@pytest.mark.parametrize("disable_jit", ["0", "1"])
def test_processes_of_different_sizes(disable_jit):
    """Each process's facts once, also with jit off, a mesh in context and transfers forbidden."""
    env = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_JIT": disable_jit}
    env = [env | {"JAX_GEMMA_ARF_DISABLE": value} for value in "01"]
    first, second = run_job(with_other_devices, seconds=60, env=env)
    assert first == second
    assert [line[-12:] for line in first[:2]] == [" disabled=0)", " disabled=1)"]
    assert "switched off by JAX_GEMMA_ARF_DISABLE" in first[2]


@pytest.mark.parametrize("unable", [{"disabled": 1}, {"built": 0}, {"version": 8}])
def test_all_try_ipc_or_none_does(monkeypatch, unable):
    """Each opens the handles of its own host's processes; one that does not try would leave the
    others waiting in the exchange."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(local_hardware_id=3)])
    sent = [b"handle of %d." % i for i in range(3)]
    monkeypatch.setattr(
        processes, "_gather", lambda _: [np.frombuffer(message, np.uint32) for message in sent]
    )
    tried = []

    def try_ipc(device, gather):
        tried.append((device, gather(sent[0])))
        return 201

    stand_in = types.SimpleNamespace(try_ipc=try_ipc)
    monkeypatch.setattr(extension, "load", lambda: stand_in)
    facts = processes.ProcessFacts(
        1, 7, built=1, flashinfer=1, nvlinked=1, visible_gpus=4, disabled=0
    )
    elsewhere = dataclasses.replace(facts, host=2)
    assert processes._ipc_error([facts, facts, elsewhere]) == 201
    assert tried == [(3, sent[1:2])]
    assert processes._ipc_error([facts, dataclasses.replace(facts, **unable)]) == 0
    assert len(tried) == 1


def test_initialize_alone(monkeypatch):
    """In a job of one process there is nobody to ask."""

    def nobody(*_):
        raise AssertionError("asked other processes")

    monkeypatch.setattr(processes, "_gather", nobody)
    jga.initialize()
    assert processes.known(1) == [processes.own_facts()]


def test_a_handle_that_cannot_be_opened(built):
    """A process in which something fails still exchanges as often as the others."""
    sent = []
    assert built.try_ipc(0, lambda message: sent.append(message) or [bytes(64)]) != 0
    assert len(sent) == 2
    assert len(sent[0]) == 64


# One GPU. The processes take turns on it, some milliseconds each.


def in_loopback(directory: str, ranks: list[int], axis_size: int) -> None:
    jga.set_peer_timeout(20)
    for algorithm in ("one_shot", "two_shot"):
        for case in CASES[:4]:
            tail = functools.partial(
                loopback_tail,
                algorithm=algorithm,
                local_ranks=tuple(ranks),
                axis_size=axis_size,
                rendezvous=directory,
            )
            call = jax.jit(tail)
            for seed in range(3):
                inputs = make_inputs(dataclasses.replace(case, seed=seed), axis_size)
                mine = inputs._replace(partial_sums=tuple(x[ranks] for x in inputs.partial_sums))
                outputs = [np.asarray(out) for out in call(Operands(*mine))]
                for i in range(len(ranks)):
                    assert_matches(case, inputs, [out[i] for out in outputs], exact_sum=True)
    held = jga.workspaces()
    assert {part.rank for part in held} == set(ranks)
    assert {part.damage for part in held} == {""}
    print("right")


@pytest.mark.parametrize("halves", [([0], [1]), ([0, 1], [2, 3])], ids=["1+1", "2+2"])
def test_loopback_in_two_processes(built, require_gpus, tmp_path, halves):
    """The exchange between processes, with the memory of another mapped through CUDA IPC."""
    require_gpus(1)
    size = sum(map(len, halves))
    pair = [children.Child(in_loopback, str(tmp_path), ranks, size) for ranks in halves]
    for child in children.run_together(pair, seconds=110):
        assert child.check().stdout.endswith("right\n")


SANDWICH = Case((3,), 640, op="sandwich", next_norms=1)
# What ranks 0 and 1 call, (case, algorithm) each, and where the error tells them apart.
DISAGREEMENTS: list[tuple[Any, ...]] = [
    ((SANDWICH, "one_shot"), (dataclasses.replace(SANDWICH, **change), algorithm), *differ)
    for change, algorithm, *differ in (
        ({"leading": (4,)}, "one_shot", "[3, 640]", "[4, 640]"),
        ({"dtype": F32}, "one_shot", "[3, 640] bfloat16", "[3, 640] float32"),
        ({"next_norms": 2}, "one_shot", "1 next norms", "2 next norms"),
        ({}, "two_shot", "one_shot", "two_shot"),
    )
]


def that_disagrees(directory: str, rank: int) -> None:
    jga.set_peer_timeout(20)
    options: dict[str, Any] = {"local_ranks": (rank,), "axis_size": 2, "rendezvous": directory}

    def call(case: Case, algorithm: str):
        inputs = make_inputs(case, 2)
        mine = inputs._replace(partial_sums=tuple(x[[rank]] for x in inputs.partial_sums))
        tail = functools.partial(loopback_tail, algorithm=algorithm, **options)
        return [np.asarray(out)[0] for out in jax.jit(tail)(Operands(*mine))]

    def right() -> None:
        for algorithm in ("one_shot", "two_shot"):
            assert_matches(
                CASES[0], make_inputs(CASES[0], 2), call(CASES[0], algorithm), exact_sum=True
            )

    def wrong() -> None:
        for calls in DISAGREEMENTS:
            with pytest.raises(jax.errors.JaxRuntimeError) as raised:
                call(*calls[rank])
            print(str(raised.value).splitlines()[0])

    # Before there is a workspace, once there is, and again without harm.
    wrong()
    right()
    wrong()
    right()
    print("right")


def test_disagreement_in_loopback(built, require_gpus, tmp_path):
    """Hazard 11: ranks that call different things get the same error at once, each time,
    and their next call works."""
    require_gpus(1)
    pair = [children.Child(that_disagrees, str(tmp_path), rank) for rank in range(2)]
    # Less than it would take were one of them to wait for the deadline of the exchange.
    outputs = [child.check().stdout for child in children.run_together(pair, seconds=55)]
    assert outputs[0] == outputs[1]
    *errors, last = outputs[0].splitlines()
    assert last == "right"
    assert len(errors) == 2 * len(DISAGREEMENTS)
    for error, (_, _, first, second) in zip(errors, 2 * DISAGREEMENTS):
        assert re.search(
            r"did not agree on a workspace: rank 1 of 2 \(CUDA device 0\): .*calls .*"
            rf"{re.escape(second)}.* where rank 0 calls .*{re.escape(first)}",
            error,
        ), error


# GPUs of their own


def mesh_over_all():
    """("data", "tp"), tp along the processes where each has several devices."""
    of_process = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(device)
    grid = np.array(list(of_process.values())).T  # [data, tp]
    return jax.sharding.Mesh(grid, ("data", "tp"))


def on_gpus(coordinator: str, index: int, gpus_each: int) -> None:
    join(coordinator, 2, index, [index * gpus_each + i for i in range(gpus_each)])
    jga.initialize()
    mesh = mesh_over_all()
    support = jga.fusion_support((1, 640), BF16, mesh=mesh, axis_name="tp")
    assert support, support.reason
    check_over_mesh(mesh, CASES, "cuda", exact_sum=True)
    assert {part.damage for part in jga.workspaces()} == {""}
    print("right")


@pytest.mark.parametrize("gpus_each", [1, 2])
def test_multi_gpu_processes(built, require_gpus, gpus_each):
    """One process a GPU, or several, by the same code as one process for all."""
    require_gpus(2 * gpus_each)
    for child in children.run_job(on_gpus, gpus_each, seconds=110):
        assert child.check().stdout.endswith("right\n")


def without_ipc(coordinator: str, index: int) -> None:
    join(coordinator, 2, index, [index])
    built: Any = extension.load()
    real = built.try_ipc

    def foreign(device, gather):
        """Runs as in separate containers: process 1 gets handles that it cannot open."""
        return real(device, lambda message: [bytes(len(b)) for b in gather(message)])

    if index == 1:
        built.try_ipc = foreign
    jga.initialize()
    print(f"\nresult: {facts_of(2)[1].ipc_error > 0}", flush=True)
    support = jga.fusion_support((1, 640), BF16, mesh=mesh_over_all(), axis_name="tp")
    print(f"\nresult: {support}", flush=True)


def test_peers_whose_memory_cannot_be_mapped(built, require_gpus):
    """Two processes of one GPU each: both fall back, with the reason."""
    require_gpus(2)
    first, second = run_job(without_ipc)
    assert first == second
    assert first[0] == "True"
    assert "FallbackCode.CUDA_IPC" in first[1]
    assert "process 1 cannot map" in first[1]


def with_a_peer_that_dies(coordinator: str, index: int, options: dict[str, str]) -> None:
    jga.set_peer_timeout(3)
    join(coordinator, 2, index, [index])
    jga.initialize()
    mesh = mesh_over_all()
    case = CASES[0]
    specs = in_specs(case)
    call = jax.jit(mesh_call(case, mesh, implementation="cuda"), compiler_options=options)
    _, placed = global_inputs(case, mesh, specs, 0)
    for step in range(6):
        if (index, step) == (1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            jax.block_until_ready(call(placed))
        except jax.errors.JaxRuntimeError as error:
            print(f"step {step} raised: {error}", flush=True)
            os._exit(1)  # atexit, jax.distributed would wait for the peer


@pytest.mark.parametrize("options", [NO_GRAPHS, GRAPHS], ids=["no_graphs", "graphs"])
def test_multi_gpu_peer_dies(built, require_gpus, options):
    """Hazard 19: the survivor hears which rank did not come, and gets an error."""
    require_gpus(2)
    survivor, victim = children.run_job(with_a_peer_that_dies, options, seconds=100)
    assert victim.status == -signal.SIGKILL
    assert survivor.status == 1, survivor
    assert re.search(r"step [45] raised", survivor.stdout), survivor
    assert re.search(
        r"rank 0 waited longer than the peer timeout for rank 1 of its replica group, in call \d+ "
        r"\(one_shot, 1 x \[1, 640\] bfloat16 over 2 ranks, 0 next norms, to bfloat16; "
        r"groups \[0, 1\]\)",
        survivor.stderr,
    ), survivor
