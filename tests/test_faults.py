"""Faults of production, brought about: ranks that stay away, memory that is full, writes
where nobody should write. Each in a process of its own, since most of it takes the GPU along."""

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers import children, device_memory
from helpers.cases import BF16, Case, assert_matches, make_inputs
from helpers.device_memory import MIB
from helpers.runners import in_specs, make_mesh, mesh_call, place
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_tail

SMALL = Case((3,), 640)


def on_device(case: Case, ranks: int) -> Operands:
    return jax.tree.map(jnp.asarray, Operands(*make_inputs(case, ranks)))


# A rank that does not come


def with_absent_rank(ranks: int, algorithm: str) -> None:
    jga.set_peer_timeout(1.0)
    case = Case((40,), 1536, op="sandwich", next_norms=1)
    options = {"algorithm": algorithm}
    operands = on_device(case, ranks)
    call = jax.jit(loopback_tail, static_argnames=("algorithm", "absent_rank"))
    jax.block_until_ready(call(operands, **options))
    print("all came", flush=True)
    jax.block_until_ready(call(operands, absent_rank=ranks - 1, **options))
    print("nobody missed the rank", flush=True)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_absent_rank_in_loopback(built, require_gpus, ranks, algorithm):
    """Hazard 19: the run raises, and stderr says who waited for whom, in what call."""
    require_gpus(1)
    ended = children.run(with_absent_rank, ranks, algorithm, seconds=60)
    assert ended.status != 0, ended
    assert ended.stdout == "all came\n", ended
    assert "JaxRuntimeError" in ended.stderr, ended
    groups = ", ".join(map(str, range(ranks)))
    told = re.search(
        r"jax_gemma_arf: rank (\d) waited longer than the peer timeout for rank (\d) of its "
        rf"replica group, in call \d+ \({algorithm}, 1 x \[40, 1536\] bfloat16 over {ranks} ranks, "
        rf"1 next norms, to bfloat16; groups \[{groups}\]\) on CUDA device 0\.",
        ended.stderr,
    )
    assert told, ended
    waiting, missing = told.groups()
    assert int(missing) == ranks - 1
    assert int(waiting) != ranks - 1


# Memory that is full


def expect_no_memory(call, operands) -> str:
    with pytest.raises(jax.errors.JaxRuntimeError, match="did not agree on a workspace") as raised:
        jax.block_until_ready(call(operands))
    assert "bytes of device memory outside JAX's own pool" in str(raised.value)
    return str(raised.value)


def in_full_memory(ranks: int) -> None:
    # 4 MiB of partial sums a rank: in one-shot at 8 ranks 64 MiB of workspace for each.
    big, leave = Case((390,), 5376, layer_scalar=None), 256 * MIB
    operands = on_device(big, ranks)
    small = on_device(SMALL, ranks)
    call = jax.jit(loopback_tail, static_argnames="algorithm")
    jax.block_until_ready(call(small, algorithm="one_shot"))
    outputs = jnp.zeros((2 * ranks, *operands.partial_sums[0].shape[1:]), BF16)
    jax.block_until_ready(outputs)
    outputs.delete()  # JAX's pool keeps the memory, for the outputs of the big call
    before = jga.workspaces()

    ballast = device_memory.fill(0, leave)
    free = device_memory.free_bytes(0)
    for _ in range(2):
        message = expect_no_memory(lambda o: call(o, algorithm="one_shot"), operands)
        assert re.search(rf"rank \d of {ranks} \(CUDA device 0\): no \d+ bytes", message), message
    assert jga.workspaces() == before
    assert (
        abs(device_memory.free_bytes(0) - free) <= 64 * MIB
    )  # the ranks that had some gave it back
    # The next call works: one that has a workspace, and one that finds memory for its own.
    for algorithm in ("one_shot", "two_shot"):
        outputs = [np.asarray(out)[0] for out in call(small, algorithm=algorithm)]
        assert_matches(SMALL, make_inputs(SMALL, ranks), outputs, exact_sum=True)
    device_memory.release(0, ballast)
    outputs = [np.asarray(out)[0] for out in call(operands, algorithm="one_shot")]
    assert_matches(big, make_inputs(big, ranks), outputs, exact_sum=True)


def test_full_memory_in_loopback(built, require_gpus):
    """Hazards 10 and 13: an error that says what was missing; it is not remembered, and nothing of
    a workspace that did not come to be stays."""
    require_gpus(1)
    children.run(in_full_memory, 8, seconds=90).check()


def in_full_memory_of_one_device(full: int) -> None:
    devices = jax.devices("cuda")[:2]
    mesh = make_mesh((2,), ("tp",), devices)
    big = Case((6000,), 5376, layer_scalar=None)  # 62 MiB: in two-shot 192 MiB of workspace

    def prepare(case):
        call = mesh_call(case, mesh, implementation="cuda", out_specs=P("tp"), every_rank=True)
        return jax.jit(call), place(mesh, make_inputs(case, 2), in_specs(case))

    small_call, small = prepare(SMALL)
    jax.block_until_ready(small_call(small))
    big_call, operands = prepare(big)
    sharded = jax.NamedSharding(mesh, P("tp"))
    outputs = jax.device_put(np.zeros((4, 6000, 5376), BF16), sharded)
    jax.block_until_ready(outputs)
    outputs.delete()  # JAX's pool keeps the memory, for the outputs of the big call

    ballast = device_memory.fill(full, 128 * MIB)
    message = expect_no_memory(big_call, operands)
    assert f"rank {full} of 2 (CUDA device {full})" in message, message
    outputs = [np.asarray(out)[0] for out in small_call(small)]
    assert_matches(SMALL, make_inputs(SMALL, 2), outputs, exact_sum=True)
    device_memory.release(full, ballast)
    (out,) = (np.asarray(out) for out in big_call(operands))
    np.testing.assert_array_equal(out[0].view(np.uint16), out[1].view(np.uint16))
    tokens = dataclasses.replace(big, leading=(40,))
    assert_matches(tokens, make_inputs(big, 2).tokens(0, 40), [out[0, :40]], exact_sum=True)


@pytest.mark.parametrize("full", [0, 1])
def test_multi_gpu_full_memory(built, require_gpus, full):
    """Hazard 10: one rank has no memory, and both get the error that names it."""
    require_gpus(2)
    children.run(in_full_memory_of_one_device, full, seconds=90).check()


def no_memory_at_the_first_call(kind: str, full: int) -> None:
    devices = jax.devices("cuda")[:2]
    inputs = make_inputs(SMALL, 2)
    if kind == "loopback":
        call, operands = loopback_tail, on_device(SMALL, 2)
    else:
        mesh = make_mesh((2,), ("tp",), devices)
        call = mesh_call(SMALL, mesh, implementation="cuda", out_specs=P("tp"), every_rank=True)
        operands = place(mesh, inputs, in_specs(SMALL))
        # The communicator is there, with the memory that it takes when it is first used.
        everything = jax.device_put(jnp.ones((2, MIB)), jax.NamedSharding(mesh, P("tp")))
        for collective in (jax.lax.psum, jax.lax.all_gather):
            local = functools.partial(collective, axis_name="tp")
            mapped = jax.shard_map(
                local, mesh=mesh, in_specs=P("tp"), out_specs=P(), check_vma=False
            )
            jax.block_until_ready(jax.jit(mapped)(everything))
    compiled = jax.jit(call).lower(operands).compile()
    for device in devices:  # JAX's pool keeps the memory, for the outputs
        jax.block_until_ready(jax.device_put(np.zeros(MIB, BF16), device)).delete()

    ballast = device_memory.fill_up(full)
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(jax.errors.JaxRuntimeError, match="jax_gemma_arf: ") as raised:
            jax.block_until_ready(compiled(operands))
        print(f"{time.monotonic() - start:.1f} s: {raised.value}", flush=True)
        assert time.monotonic() - start < 20
        if kind != "loopback":
            assert f"rank {full} of 2 (CUDA device {full})" in str(raised.value)
    assert jga.workspaces() == []
    device_memory.release(full, ballast)
    outputs = [np.asarray(out)[0] for out in compiled(operands)]
    assert_matches(SMALL, inputs, outputs, exact_sum=True)


@pytest.mark.parametrize(("kind", "full"), [("loopback", 0), ("multi_gpu", 0), ("multi_gpu", 1)])
def test_no_memory_at_the_first_call(built, require_gpus, kind, full):
    """Hazard 10: a GPU is full to the last bytes before the ranks have ever met, when there is no
    memory for meeting either. All get an error that names it, at once."""
    require_gpus(2 if kind == "multi_gpu" else 1)
    children.run(no_memory_at_the_first_call, kind, full, seconds=100).check()


# Writes where nobody should write


def with_stray_writes(ranks: int) -> None:
    for algorithm in ("one_shot", "two_shot"):
        jax.block_until_ready(loopback_tail(on_device(SMALL, ranks), algorithm=algorithm))
    parts = jga.workspaces()
    assert len(parts) == 2 * ranks
    assert {part.damage for part in parts} == {""}
    # Control, its padding to 256 bytes, guard; slots; guard.
    end = parts[1].base + parts[1].bytes
    for address in (parts[0].base + 256, end - 1):
        device_memory.write_byte(0, address, 7)
    damage = [part.damage for part in jga.workspaces()]
    assert damage == [
        "something wrote over the guard words before the slots",
        "something wrote over the guard words behind the slots",
        *[""] * (2 * ranks - 2),
    ]


def test_guard_words_in_loopback(built, require_gpus):
    """Hazard 18: a stray write next to the slots is found, and on which rank's side."""
    require_gpus(1)
    children.run(with_stray_writes, 4, seconds=60).check()


# What docs/design.md forbids


def two_calls_at_once(ranks: int, algorithm: str) -> None:
    jga.set_peer_timeout(2.0)
    cases = [dataclasses.replace(SMALL, leading=(64,), seed=seed) for seed in range(2)]
    operands = [on_device(case, ranks) for case in cases]
    pair = jax.jit(
        lambda one, two: (
            loopback_tail(one, algorithm=algorithm),
            loopback_tail(two, algorithm=algorithm),
        ),
        compiler_options={
            "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
            "xla_gpu_enable_command_buffer": "CUSTOM_CALL",
            "xla_gpu_graph_min_graph_size": "1",
        },
    )
    for _ in range(200):
        try:
            outputs = jax.device_get(pair(*operands))
        except jax.errors.JaxRuntimeError:
            print("raised", flush=True)
            raise
        for case, (out,) in zip(cases, outputs):
            try:
                assert_matches(case, make_inputs(case, ranks), [out[0]], exact_sum=True)
            except AssertionError:
                print("wrong", flush=True)
                return
    print("right", flush=True)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_two_calls_at_once_in_loopback(built, require_gpus, capsys, record_property, algorithm):
    """Hazard 9: what happens where a user lets XLA run independent calls concurrently, which
    docs/design.md forbids. Whatever it is, it ends."""
    require_gpus(1)
    ended = children.run(two_calls_at_once, 2, algorithm, seconds=60)
    outcome = ended.stdout.strip()
    assert outcome in ("right", "wrong", "raised"), ended
    record_property("outcome", outcome)
    with capsys.disabled():
        print(f"\ntwo calls at once, {algorithm}: {outcome}")
