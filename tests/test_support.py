"""The decision: static, the same for all ranks, with reasons that a person can act on."""

import dataclasses
import functools
import json
import re
import types
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gemma_arf as jga
from helpers.cases import GEMMA_WIDTHS
from jax_gemma_arf import fusion_support
from jax_gemma_arf._src import decision, extension, processes
from jax_gemma_arf._src.mesh import replica_groups
from jax_gemma_arf._src.operands import (
    AXIS_SIZES,
    MAX_MESSAGE_BYTES,
    MAX_ONE_SHOT_BYTES,
    THRESHOLDS,
    Operation,
)


class FakeClient:
    """A client with GPUs, as the decision sees them. owners: the process of each."""

    def __init__(self, owners=(0, 0, 0, 0), capabilities=("9.0",), kinds=("H100",)):
        self._devices = [
            types.SimpleNamespace(
                platform="gpu",
                compute_capability=capabilities[i % len(capabilities)],
                device_kind=kinds[i % len(kinds)],
                process_index=process,
                client=self,
            )
            for i, process in enumerate(owners)
        ]

    def devices(self):
        return self._devices


@pytest.fixture
def nvlinked(monkeypatch):
    """An extension that finds all devices linked; settable to not."""
    fake = types.SimpleNamespace(linked=True)
    monkeypatch.setattr(extension, "load", lambda *_: fake)
    monkeypatch.setattr(extension, "nvlink_peers", lambda: [[True] * 4, *[[fake.linked] * 4] * 3])
    monkeypatch.setattr(extension, "why_missing", lambda *_: None)
    return fake


ABSTRACT = jax.sharding.AbstractMesh((2, 2), ("data", "tp"))


def decide(shape=(1, 5376), dtype=jnp.bfloat16, mesh=ABSTRACT, **options):
    options = {"client": FakeClient(), **options}
    return decision.decide(shape, jnp.dtype(dtype), mesh=mesh, names=("tp",), **options)


def test_accepts(nvlinked):
    for width in GEMMA_WIDTHS:
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            for shape in ((width,), (1, width), (2, 3, width), (129, width)):
                assert decide(shape, dtype).ok


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mesh": jax.sharding.AbstractMesh((3,), ("tp",))}, "axis 'tp' must have 2, 4.*got 3"),
        ({"dtype": jnp.float64}, "x must be bfloat16, float16 or float32, got float64"),
        ({"shape": (1, 64)}, "D must be a multiple of 64 from 256 to 16384, got 64"),  # hazard 2
        ({"shape": (1, 1000)}, "D must be a multiple of 64.*got 1000"),
        ({"shape": (1, 32768)}, "D must be a multiple of 64.*got 32768"),
        ({"shape": (30000, 5376)}, "above the workspace cap.*at most 24966 tokens"),
        ({"shape": (13000, 5376), "branches": 2}, "at most 12483 tokens"),
        ({"manual_axes": frozenset({"tp"})}, r"mesh axes \['data'\] are not manual"),
        ({"client": FakeClient(capabilities=("8.0", "9.0"))}, "compute capability.*got 8.0, 9.0"),
        ({"client": FakeClient(kinds=("H100", "H200"))}, "devices must be alike, got H100, H200"),
        ({"client": FakeClient(owners=(0, 0, 1, 1))}, "2 processes, which do not know.*initialize"),
    ],
)
def test_reasons(nvlinked, arguments, reason):
    decision = decide(**arguments)
    assert not decision
    assert not decision.deliberate
    assert decision.algorithm is None
    assert re.search(reason, decision.reason), decision.reason


def test_caps_are_inclusive(nvlinked):
    tokens = MAX_MESSAGE_BYTES // 1280
    assert decide((tokens, 640)).ok
    assert not decide((tokens + 1, 640)).ok


def test_branches_count_alike(nvlinked):
    """Two branches of half the tokens are as many bytes, with what follows from that."""
    tokens = MAX_MESSAGE_BYTES // 2560
    assert decide((tokens, 640), branches=2).ok
    assert not decide((tokens + 1, 640), branches=2).ok
    assert decide((tokens + 1, 640)).ok
    tokens = decision.one_shot_max_bytes(2) // 2560
    assert decide((tokens, 640), branches=2).algorithm == "one_shot"
    assert decide((tokens + 1, 640), branches=2).algorithm == "two_shot"
    assert decide((tokens + 1, 640)).algorithm == "one_shot"


@pytest.mark.parametrize("op", ["post_ff", "fused_moe", None, 2])
def test_unknown_op(op):
    names = "fused_post_ff, fused_sandwich, fused_all_reduce_norm, fused_moe_tail"
    with pytest.raises(ValueError, match=f"op must be one of {names}, got {op!r}"):
        fusion_support((1, 640), jnp.bfloat16, mesh=ABSTRACT, axis_name="tp", op=op)


@pytest.mark.parametrize("op", get_args(Operation))
def test_operations(nvlinked, op):
    """All are public; fused_moe_tail alone reduces two partial sums."""
    assert op in jga.__all__
    tokens = 1 + MAX_MESSAGE_BYTES // 2560
    support = fusion_support((tokens, 640), jnp.bfloat16, mesh=ABSTRACT, axis_name="tp", op=op)
    assert support.ok == (op != "fused_moe_tail"), support.reason


def test_partly_manual(nvlinked):
    """Over some axes of the mesh, as jax.shard_map's axis_names."""

    def support(manual_axes, mesh=ABSTRACT):
        options: dict[str, Any] = {"mesh": mesh, "axis_name": "tp", "manual_axes": manual_axes}
        return fusion_support((1, 640), jnp.bfloat16, **options)

    for part in ("tp", ("tp",), ["tp"], {"tp"}, frozenset({"tp"})):
        (reason,) = support(part).reasons
        assert reason.startswith("mesh axes ['data'] are not manual")
    for whole in (None, {"data", "tp"}, ("tp", "data")):
        assert support(whole).ok
    assert support("tp", jax.sharding.AbstractMesh((1, 2), ("data", "tp"))).ok
    with pytest.raises(ValueError, match="manual_axes must name one or several different axes"):
        support({"tp", "model"})
    with pytest.raises(ValueError, match="manual_axes must include axis_name 'tp', got 'data'"):
        support("data")


def test_nothing_to_reduce(nvlinked):
    one = jax.sharding.AbstractMesh((1, 2), ("tp", "data"))
    assert decide(mesh=one).reason == "the axis has one rank, so there is nothing to reduce"
    assert decide((0, 640)).reason == "x of shape (0, 640) has no tokens"
    assert decide(mesh=one).deliberate
    assert decide((0, 640)).deliberate


def test_cpu_platform(mesh):
    support = fusion_support((1, 5376), jnp.bfloat16, mesh=mesh, axis_name="tp")
    assert support.reasons == ("platform is cpu, not CUDA",)
    assert support.reason == support.reasons[0]


def test_not_built(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda *_: None)
    monkeypatch.setattr(
        extension, "why_missing", lambda *_: "the extension was not built (no nvcc)"
    )
    assert decide().reason == "the extension was not built (no nvcc)"
    assert decide(client=None).reason == "the extension was not built (no nvcc)"


def codes(support) -> list[str]:
    return [objection.code for objection in support.objections]


def test_all_reasons(nvlinked, monkeypatch):
    """An objection hides no other, and later checks live with what earlier ones found."""
    (tokens,) = jax.export.symbolic_shape("tokens")
    shape: Any = (tokens, 1000)
    everything = {
        "mesh": jax.sharding.AbstractMesh((2, 3), ("data", "tp")),
        "manual_axes": frozenset({"tp"}),
        "client": FakeClient((0, 0, 1, 1), capabilities=("8.0",), kinds=("H100", "H200")),
    }
    support = decide(shape, jnp.int8, **everything)
    at_the_call = ["ranks", "dtype", "symbolic_shape", "partly_manual"]
    on_the_machine = ["compute_capability", "mixed_devices", "not_initialized"]
    assert codes(support) == at_the_call + on_the_machine
    assert [reason.split()[0] for reason in support.reasons] == [
        *("axis", "x", "x", "mesh", "compute", "devices", "the")
    ]
    assert codes(decide((10**6, 1000), client=None)) == ["width", "message_bytes"]
    lacking = dataclasses.replace(FACTS, version=8, nvlinked=0, ipc_error=201, host=2)
    gathered(monkeypatch, FACTS, dataclasses.replace(lacking, visible_gpus=1))
    across = jax.sharding.AbstractMesh((2, 2), ("tp", "data"))
    support = decide(mesh=across, client=FakeClient((0, 0, 1, 1)))
    assert codes(support) == ["versions", "hidden_gpus", "no_nvlink", "cuda_ipc", "several_hosts"]


def test_every_code_is_documented():
    documented = re.findall(r"^      ([A-Z_]+): ", jga.FallbackCode.__doc__ or "", re.MULTILINE)
    assert documented == [*jga.FallbackCode.__members__]


def test_reasons_that_follow_from_another_are_left_out(nvlinked, monkeypatch):
    for built, code in ((0, "not_built"), (1, "no_visible_gpu")):
        lacking = dataclasses.replace(FACTS, built=built, nvlinked=0, visible_gpus=0)
        gathered(monkeypatch, FACTS, lacking)
        assert codes(decide(client=FakeClient((0, 0, 1, 1)))) == [code]
    gathered(monkeypatch, FACTS, dataclasses.replace(FACTS, built=0, visible_gpus=0))
    flashinfer = decide(client=FakeClient((0, 0, 1, 1)), implementation="flashinfer")
    assert codes(flashinfer) == ["not_built"]  # of this library's kernels, which look at the GPUs
    monkeypatch.setenv(processes.DISABLE_VARIABLE, "1")
    monkeypatch.setattr(processes, "_gathered", None)
    one = jax.sharding.AbstractMesh((1,), ("tp",))
    assert codes(decide((0, 640), mesh=one)) == ["switched_off", "one_rank", "no_tokens"]


def test_processes_compare_the_limits_of_one_shot(monkeypatch):
    """Their file can be rewritten, and ranks with other limits would choose another algorithm."""
    version = processes.own_facts().version
    limits = processes.ONE_SHOT_MAX_BYTES | {("another", 2): 1 << 20}
    monkeypatch.setattr(processes, "ONE_SHOT_MAX_BYTES", limits)
    assert processes.own_facts().version != version


def test_no_nvlink(nvlinked):
    """Hazard 26: bridged pairs or PCIe fall back with the reason."""
    nvlinked.linked = False
    assert "NVLink" in decide(client=FakeClient()).reason


def test_no_gpu_for_the_extension(nvlinked, monkeypatch):
    """JAX may run on a driver that is too old for the extension's CUDA runtime (hazard 35)."""
    monkeypatch.setattr(extension, "nvlink_peers", lambda: [])
    reason = decide(client=FakeClient()).reason
    assert "CUDA runtime finds no GPU where JAX has 4 on this host" in reason
    assert "CUDA_VISIBLE_DEVICES" not in reason


def test_switched_off(nvlinked, monkeypatch):
    monkeypatch.setenv(processes.DISABLE_VARIABLE, "1")
    assert decide().reason == "switched off by JAX_GEMMA_ARF_DISABLE"
    monkeypatch.setenv(processes.DISABLE_VARIABLE, "0")
    assert decide().ok


def test_the_driver_is_asked_once(monkeypatch):
    """However many calls are lowered; the switch is read for each."""
    answers = iter([[[True, False], [False, True]]])
    fake = types.SimpleNamespace(nvlink_peers=lambda: next(answers))
    monkeypatch.setattr(extension, "load", lambda *_: fake)
    uncached = extension.nvlink_peers.__wrapped__
    monkeypatch.setattr(extension, "nvlink_peers", functools.cache(uncached))
    for switch in ("0", "1", "0"):
        monkeypatch.setenv(processes.DISABLE_VARIABLE, switch)
        facts = processes.own_facts()
        assert (facts.visible_gpus, facts.nvlinked, facts.disabled) == (2, False, switch == "1")


FACTS = processes.ProcessFacts(1, 7, built=1, flashinfer=1, nvlinked=1, visible_gpus=4, disabled=0)


def gathered(monkeypatch, *facts):
    """Sets the facts as initialize does in a job of that many processes."""
    monkeypatch.setattr(processes, "_gathered", list(facts))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"built": 0}, r"not built \(process 1\)"),
        ({"version": 8}, "process 1 runs another version"),
        ({"nvlinked": 0}, r"NVLink peer access .* \(process 1\)"),
        ({"visible_gpus": 2}, "process 1 sees 2 of its host's 4 GPUs.*local_device_ids"),
        ({"visible_gpus": 0}, r"CUDA runtime finds no GPU .* driver is older.*\(process 1\)"),
        ({"ipc_error": 201}, r"process 1 cannot map .*\(CUDA IPC, error 201\); run them in one"),
        ({"disabled": 1}, "switched off by JAX_GEMMA_ARF_DISABLE"),
    ],
)
def test_what_one_process_lacks_holds_for_all(nvlinked, monkeypatch, change, reason):
    """Hazard 11: the decision is the same wherever it is made."""
    gathered(monkeypatch, FACTS, dataclasses.replace(FACTS, **change))
    decision = decide(client=FakeClient(owners=(0, 0, 1, 1)))
    assert decision.ok if reason is None else re.search(reason, decision.reason), decision.reason


def test_groups_stay_on_one_host(nvlinked, monkeypatch):
    two_hosts = (FACTS, dataclasses.replace(FACTS, host=2))
    gathered(monkeypatch, *two_hosts)
    client = FakeClient(owners=(0, 0, 1, 1))
    assert decide(client=client).ok
    across = jax.sharding.AbstractMesh((2, 2), ("tp", "data"))
    assert "axis 'tp' reaches over several hosts" in decide(mesh=across, client=client).reason


@pytest.mark.parametrize("axis_name", ["model", (), ("tp", "tp"), ("tp", "model"), None, 5])
def test_unknown_axis(axis_name):
    with pytest.raises(ValueError, match="axis_name must name one or several different axes"):
        fusion_support((1, 640), jnp.bfloat16, mesh=ABSTRACT, axis_name=axis_name)


@pytest.mark.parametrize(
    "shape",
    [
        (np.prod([4, 2]), 5376),
        np.array([8, 5376]),
        [np.int32(8), np.int64(5376)],
        (jnp.int32(8), 5376),
    ],
    ids=["np.prod", "array", "list", "jax"],
)
def test_sizes_of_any_library(nvlinked, shape):
    """Sizes are computed, often by NumPy, and are integers all the same."""
    decision = fusion_support(shape, jnp.bfloat16, mesh=ABSTRACT, axis_name="tp")
    assert decision == fusion_support((8, 5376), jnp.bfloat16, mesh=ABSTRACT, axis_name="tp")
    assert decision.ok, decision.reason


@pytest.mark.parametrize("shape", [(-1, 5376), (4, -64), (np.int64(-1), 5376)])
def test_negative_sizes(shape):
    with pytest.raises(ValueError, match=r"sizes of at least 0, got \(.*; -1 is not inferred"):
        fusion_support(shape, jnp.bfloat16, mesh=ABSTRACT, axis_name="tp")


@pytest.mark.parametrize("shape", [(4.0, 5376), ("4", 5376), (None, 5376), np.ones((2, 2))])
def test_sizes_that_are_no_integers(shape):
    with pytest.raises(TypeError, match="x_shape must hold integers, got"):
        fusion_support(shape, jnp.bfloat16, mesh=ABSTRACT, axis_name="tp")


def test_symbolic_sizes(nvlinked):
    shape: Any = (*jax.export.symbolic_shape("tokens"), 5376)
    decision = fusion_support(shape, jnp.bfloat16, mesh=ABSTRACT, axis_name="tp")
    assert decision.reason.startswith("x must have a static shape")


def test_no_last_axis():
    with pytest.raises(ValueError, match="x must have a last axis"):
        fusion_support((), jnp.bfloat16, mesh=ABSTRACT, axis_name="tp")


@pytest.mark.parametrize("ranks", AXIS_SIZES)
def test_algorithm_rule(ranks):
    """One-shot up to the documented bytes, two-shot from the next size on."""
    limit = decision.one_shot_max_bytes(ranks)
    assert decision.choose_algorithm(ranks, 1) == "one_shot"
    assert decision.choose_algorithm(ranks, limit) == "one_shot"
    assert decision.choose_algorithm(ranks, limit + 1) == "two_shot"


@pytest.fixture
def measured(monkeypatch):
    """Thresholds in which two of another device have been measured."""
    table = {("H200", 2): 1 << 20, ("H200", 4): 128 << 20}
    monkeypatch.setattr(decision, "ONE_SHOT_MAX_BYTES", decision.ONE_SHOT_MAX_BYTES | table)


def test_thresholds_by_device_kind(nvlinked, measured):
    """A kind or a number of ranks without limits has the default kind's."""
    limits = decision.one_shot_max_bytes
    assert limits(2, kind="H200") == 1 << 20
    assert limits(4, kind="H200") == MAX_ONE_SHOT_BYTES
    assert limits(8, kind="H200") == limits(8, kind="B200") == limits(8)
    assert limits(2, "flashinfer", "H200") == limits(2, "flashinfer")
    shape = (1 << 10, 640)  # 1.25 MiB
    assert decide(shape, client=FakeClient(kinds=("H200",))).algorithm == "two_shot"
    for client in (FakeClient(), FakeClient(kinds=("B200",)), None):
        assert decide(shape, client=client).algorithm == "one_shot"


def test_file_of_thresholds():
    """Gives H100's limits; an entry that was not measured says where it is from."""
    limits = {ranks: decision.one_shot_max_bytes(ranks) for ranks in AXIS_SIZES}
    assert limits == {2: 2 << 20, 4: 384 << 10, 8: 128 << 10}
    for kind in json.loads(THRESHOLDS.read_text()).values():
        assert {int(ranks) for ranks in kind} <= set(AXIS_SIZES)
        for entry in kind.values():
            assert 0 < entry["bytes"] <= MAX_ONE_SHOT_BYTES
            assert entry["measured"] or entry["note"]


def test_replica_groups():
    """Hazards 7 and 25: groups come from the mesh, whatever the order of its axes."""
    data_tp = jax.sharding.AbstractMesh((2, 4), ("data", "tp"))
    tp_data = jax.sharding.AbstractMesh((4, 2), ("tp", "data"))
    cube = jax.sharding.AbstractMesh((2, 2, 2), ("a", "b", "c"))
    for mesh, names, groups in (
        (data_tp, ("tp",), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (tp_data, ("tp",), [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (cube, ("b",), [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (cube, ("a", "c"), [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (cube, ("c", "a"), [[0, 4, 1, 5], [2, 6, 3, 7]]),
    ):
        np.testing.assert_array_equal(replica_groups(mesh, names), groups)
