"""The compiled part, as far as a machine without a GPU can tell."""

import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from jaxlib import xla_client

import jax_gemma_arf
from helpers import children
from helpers.cases import BF16, Case, Inputs, assert_matches, make_inputs
from helpers.runners import in_specs, make_mesh, mesh_call, place
from jax_gemma_arf import __main__ as report
from jax_gemma_arf._src import decision, extension, lowering
from jax_gemma_arf._src import operands as limits
from jax_gemma_arf.loopback import Operands, loopback_tail

ROOT = Path(__file__).parent.parent
REGISTER_TARGET = "jax_gemma_arf.register_tail"


def test_handlers_register(built):
    assert set(built.registrations()) == {REGISTER_TARGET, lowering.LOOPBACK_TARGET}
    assert set(built.registrations()[REGISTER_TARGET]) == {"execute"}
    # Loopback has several kernels a call: XLA captures them.
    loopback_stages = {"instantiate", "initialize", "execute"}
    assert set(built.registrations()[lowering.LOOPBACK_TARGET]) == loopback_stages
    assert extension.load() is built  # registered once


@pytest.mark.parametrize("record", [True, False])
def test_mesh_handlers_register(built, record):
    """XLA takes the record handler too, which jax.ffi.register_ffi_target would drop. In a process
    of its own, with the runtime for CPUs, which asks for the same metadata."""
    code = (
        "import jax\n"
        "from jax_gemma_arf._src import extension\n"
        "built = extension.load()\n"
        "assert built.mesh_stages() == []\n"
        "jax.devices()  # registrations wait for the runtime\n"
        "for name, registration in built.type_registrations().items():\n"
        "    jax.ffi.register_ffi_type(name, registration, platform='cpu')\n"
        f"stages = built.registrations()['{REGISTER_TARGET}']\n"
        f"jax.ffi.register_ffi_target('{REGISTER_TARGET}', stages, platform='cpu')\n"
        "print(*built.mesh_stages())"
    )
    environment = {"JAX_PLATFORMS": "cpu", extension.RECORD_VARIABLE: str(int(record))}
    result = children.python("-c", code, **environment).check()
    stages = ["instantiate", "prepare", "initialize", "execute"] + ["record"] * record
    assert result.stdout.split() == stages


def refusing_stages() -> None:
    """Prints the stages that refuse a call on CPUs: with its attributes, and without any."""
    jax.devices()  # registrations wait for the runtime
    module = extension.load()
    assert module is not None
    for name, registration in module.type_registrations().items():
        jax.ffi.register_ffi_type(name, registration, platform="cpu")
    target = lowering.LOOPBACK_TARGET
    jax.ffi.register_ffi_target(target, module.registrations()[target], platform="cpu")
    operands = jax.tree.map(jnp.asarray, Operands(*make_inputs(Case(), 2)))
    result = jax.ShapeDtypeStruct(operands.partial_sums[0].shape, operands.dtype)
    calls = (loopback_tail, lambda operands: jax.ffi.ffi_call(target, result)(*operands[0]))
    for call in calls:
        with pytest.raises(jax.errors.JaxRuntimeError) as error:
            jax.block_until_ready(call(operands))
        print(*re.findall(r"\[(\w+)\] Failed to decode", str(error.value)))


def test_attributes_decode(built):
    """Instantiate, which needs no GPU, decodes exactly the attributes that Python gives: a call
    gets to Execute, which asks for a GPU's stream."""
    ended = children.run(refusing_stages, seconds=60, env={"JAX_PLATFORMS": "cpu"}).check()
    assert ended.stdout.split() == ["execute", "instantiate"]


def test_record_is_for_known_versions():
    """Recording is asked for; XLA's interface for it may change until it is stable."""
    newest_tested = (0, 12)
    known = jaxlib.version.__version_info__[:2] <= newest_tested
    code = "from jax_gemma_arf._src import extension; print(extension.RECORD)"
    for value, expected in (("", False), ("0", False), ("1", known)):
        environment = {"JAX_PLATFORMS": "cpu", extension.RECORD_VARIABLE: value}
        result = children.python("-c", code, **environment).check()
        assert result.stdout.split() == [str(expected)]


def export(call, inputs: Inputs, *platforms: str) -> jax.export.Exported:
    """Exports a call as a function of the inputs' arrays."""
    leaves, tree = jax.tree.flatten(inputs)
    return jax.export.export(
        jax.jit(lambda *leaves: call(tree.unflatten(leaves))),
        platforms=platforms,
        disabled_checks=jax_gemma_arf.DISABLED_EXPORT_CHECKS,
    )(*leaves)


def export_into(path: str) -> None:
    """Writes a program that holds the kernel, as a process without a GPU can."""
    jax.config.update("jax_num_cpu_devices", 2)
    case = Case((4,), 640, BF16)
    call = mesh_call(case, make_mesh((2,), ("tp",), jax.devices()), implementation="cuda")
    exported = export(call, make_inputs(case, 2), "cuda")
    Path(path).write_bytes(exported.serialize())


def what_runs(path: str) -> None:
    """Stands in for the CUDA plugin, which takes what was registered before it was loaded."""
    program = jax.export.deserialize(bytearray(Path(path).read_bytes())).mlir_module()
    registered = []

    def register(name, *_: Any, **__: Any) -> None:
        registered.append(name)

    xla_client.register_custom_call_handler("CUDA", register)
    xla_client.register_custom_type_handler("CUDA", register)
    ours = [name for name in sorted(registered) if name.startswith("jax_gemma_arf")]
    print(re.findall(r"custom_call @(jax_gemma_arf\.\w+)", program), ours)


def test_exported_program_in_another_process(built, tmp_path):
    """Nothing is lowered there, so what it calls must be registered at import (hazard 33)."""
    path = str(tmp_path / "program")
    env = {"JAX_PLATFORMS": "cpu"}
    children.run(export_into, path, seconds=60, env=env).check()
    loaded = children.run(what_runs, path, seconds=60, env=env).check()
    # What registers the call is registered, by name.
    registered = []
    for module in filter(None, map(extension.load, lowering.TARGETS)):
        registered += [*module.type_registrations(), *module.registrations()]
    assert loaded.stdout.strip() == f"{[lowering.TARGET_NAME]} {sorted(registered)}"


def test_exported_for_several_platforms(built, cpus):
    """XLA looks for the handler on each of them, so none has the kernel; it runs where it can."""
    mesh = make_mesh((2,), ("tp",), cpus[:2])
    case = Case((4,), 640)
    inputs = make_inputs(case, 2)
    exported = export(mesh_call(case, mesh), inputs, "cuda", "cpu")
    assert f"@{lowering.TARGET_NAME}" not in exported.mlir_module()
    loaded = jax.export.deserialize(exported.serialize())
    leaves = jax.tree.leaves(place(mesh, inputs, in_specs(case)))
    outputs = jax.jit(loaded.call)(*leaves)
    assert_matches(case, inputs, [np.asarray(out) for out in outputs], exact_sum=False)


def test_versions_agree(built):
    assert built.__version__ == jax_gemma_arf.__version__


def test_version_mismatch_says_what_to_reinstall(built, monkeypatch):
    """Hazard 27: a stale binary is an error at import."""
    monkeypatch.setattr(built, "__version__", "0.0.1")
    with pytest.raises(ImportError, match=r"built for 0\.0\.1; reinstall the package: pip install"):
        importlib.reload(extension)
    monkeypatch.undo()
    importlib.reload(extension)


def test_import_without_extension():
    """Without it the package imports, and says in one line what the build lacked."""
    for not_built, reason in (
        ("None", "this is a source tree; install the package"),
        ("types.SimpleNamespace(REASON='no C++ compiler found')", "no C++ compiler found"),
    ):
        code = (
            "import sys, types; sys.modules['jax_gemma_arf._ffi'] = None\n"
            f"sys.modules['jax_gemma_arf._not_built'] = {not_built}\n"
            "import jax_gemma_arf.__main__ as report; print(report.describe_extension())"
        )
        result = children.python("-c", code).check()
        assert result.stdout.startswith(f"runs as psum, the extension was not built: {reason}")
        assert result.stdout.count("\n") == 1


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Configures the build in folder."""
    cmake = shutil.which("cmake") or pytest.skip("needs cmake")
    python = f"-DPython_EXECUTABLE={sys.executable}"
    return subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(folder), python, *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("required", [False, True])
def test_build_without_a_compiler(tmp_path, required):
    """The build says what it lacked, and fails if the kernel is required."""
    option = f"-DJAX_GEMMA_ARF_REQUIRE_KERNEL={'ON' if required else 'OFF'}"
    result = configure(tmp_path, option, CXX=str(tmp_path / "no-compiler"))
    assert (result.returncode != 0) == required
    if required:
        assert "the kernel cannot be compiled" in result.stderr
    else:
        assert 'REASON = "no C++ compiler found"' in (tmp_path / "_not_built.py").read_text()


NANOBIND = """
function(nanobind_add_module name)
  list(REMOVE_ITEM ARGN STABLE_ABI NB_STATIC)
  add_library(${name} MODULE ${ARGN})
endfunction()
"""


@pytest.mark.parametrize("temporary", ["with_none", "with a space"])
def test_temporary_folder_with_a_space(tmp_path, temporary):
    """Hazard 38: nvcc 13.0 then fails with threads, and without them only takes longer.

    A stand-in for nanobind, which is not installed where tests run; nothing is compiled."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    stand_in = tmp_path / "python" / "nanobind"
    stand_in.mkdir(parents=True)
    (stand_in / "__main__.py").write_text(f"print({str(stand_in)!r})")
    (stand_in / "nanobind-config.cmake").write_text(NANOBIND)
    (tmp_path / temporary).mkdir()
    configured = configure(
        tmp_path / "build",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        PYTHONPATH=str(stand_in.parent),
        TMPDIR=str(tmp_path / temporary),
    )
    assert configured.returncode == 0, configured.stderr
    if "without the kernel" in configured.stderr:
        pytest.skip(f"needs what the build needs: {configured.stderr}")
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    (kernels,) = (one["command"] for one in commands if one["file"].endswith("kernels.cu"))
    assert "-fmad=false" in kernels
    assert ("--threads=2" in kernels) == (" " not in temporary)


@pytest.mark.parametrize("implementation", lowering.TARGETS)
def test_limits_agree(built, implementation):
    """Python decides with the limits that the handlers enforce."""
    module = extension.load(implementation)
    if module is None:
        pytest.skip(extension.why_missing(implementation) or "")
    assert module.limits() == {
        "axis_sizes": limits.AXIS_SIZES,
        "width_multiple": limits.WIDTH_MULTIPLE,
        "min_width": limits.MIN_WIDTH,
        "max_width": limits.MAX_WIDTH,
        "max_next_norms": limits.MAX_NEXT_NORMS,
        "max_message_bytes": limits.MAX_MESSAGE_BYTES,
        "max_one_shot_bytes": limits.MAX_ONE_SHOT_BYTES,
    }


@pytest.mark.parametrize("implementation", lowering.TARGETS)
@pytest.mark.parametrize("ranks", limits.AXIS_SIZES)
def test_one_shot_stays_below_its_cap(implementation, ranks):
    """The handlers take every message for which the rule chooses one-shot."""
    above = limits.MAX_ONE_SHOT_BYTES + 1
    assert decision.choose_algorithm(ranks, above, implementation) == "two_shot"


@pytest.mark.parametrize("ranks", limits.AXIS_SIZES)
def test_workspace_bytes(built, ranks):
    """Hazard 16: both generations are counted: of a message per rank in one-shot, of one message in
    two-shot, which keeps the finished rows besides."""
    message = 1 << 20
    assert 0 < built.workspace_bytes(True, ranks, message) - 2 * ranks * message <= 1024
    assert 0 < built.workspace_bytes(False, ranks, message) - 3 * message <= 1024


def test_size_classes(built):
    """Messages share a workspace up to the next power of two, so sizes need few of them."""
    sizes = [2 * tokens * 5376 for tokens in range(1, 4096)]
    classes = {built.workspace_bytes(False, 2, size) for size in sizes}
    assert len(classes) <= math.ceil(math.log2(sizes[-1] / sizes[0])) + 1


@pytest.mark.parametrize("seconds", [0, -1, 1e-10, 1e6, float("nan")])
def test_bad_peer_timeout(seconds):
    with pytest.raises(ValueError, match=r"seconds must be None or from 0\.001"):
        jax_gemma_arf.set_peer_timeout(seconds)


def test_no_workspaces_yet(built):
    assert jax_gemma_arf.workspaces() == []


def test_workspaces_are_records(monkeypatch):
    """With a field for each key that ffi/module.cc reports."""
    keys = re.findall(r'one\["(\w+)"\]', (ROOT / "ffi" / "module.cc").read_text())
    part = {key: i for i, key in enumerate(keys)}
    module = types.SimpleNamespace(workspaces=lambda: [part])
    monkeypatch.setattr(extension, "_modules", {"cuda": module})
    (workspace,) = jax_gemma_arf.workspaces()
    assert dataclasses.asdict(workspace) == {"implementation": "cuda", **part}
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(workspace, "damage", "")  # noqa: B010


def test_stub_matches_module(built):
    stub = (ROOT / "jax_gemma_arf" / "_ffi.pyi").read_text()
    declared = set(re.findall(r"^(?:def )?(\w+)[:(]", stub, re.MULTILINE))
    public = {name for name in vars(built) if not name.startswith("_")} | {"__version__"}
    assert declared == public


def test_report(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jax_gemma_arf"])
    report.main()
    out = capsys.readouterr().out
    assert f"jax_gemma_arf {jax_gemma_arf.__version__}" in out
    for model, width in report.GEMMA4_WIDTHS.items():
        assert re.search(rf"{model} +D = {width}, +1 tokens: (kernel|psum) +\(.+\)", out)


@pytest.mark.parametrize("version", ["0.12.0.1", "0.12.0.2"])
def test_newer_jax_warns_at_import(version):
    program = (
        f"import jax; jax.__version__ = {version!r}; "
        "jax.__version_info__ = tuple(map(int, jax.__version__.split('.'))); import jax_gemma_arf"
    )
    result = children.python("-W", "error::UserWarning", "-c", program)
    newer = version == "0.12.0.2"
    assert ("tested with JAX up to 0.12.0.1, this is" in result.stderr) == newer
    assert result.status == int(newer), result


@pytest.mark.parametrize(
    ("old", "name", "now"),
    [
        ("reference", "Operands", Operands),
        ("reference", "rmsnorm", jax_gemma_arf.rmsnorm),
        ("support", "fusion_support", jax_gemma_arf.fusion_support),
    ],
)
def test_moved_names(old, name, now):
    """The old place works for one release, with a warning that names the new one."""
    module = importlib.import_module(f"jax_gemma_arf.{old}")
    with pytest.warns(DeprecationWarning, match=rf"{name} has moved to jax_gemma_arf.*\.{name}"):
        assert getattr(module, name) is now
    with pytest.raises(AttributeError, match="has no attribute 'tail'"):
        _ = module.tail


def test_public_names():
    """The listed names report the package as their module, and pickle."""
    for name in jax_gemma_arf.__all__:
        public = getattr(jax_gemma_arf, name)
        if callable(public):
            assert public.__module__ == "jax_gemma_arf", name
            assert pickle.loads(pickle.dumps(public)) is public
    support = jax_gemma_arf.Support(launch="x")
    assert pickle.loads(pickle.dumps(support)).reason == "x"


def test_collects_without_optional_packages(tmp_path):
    """On a GPU machine with JAX and Flax alone, `pytest -k multi_gpu` finds its tests."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(['gemma', 'qwix', 'tunix']))\n"
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", "multi_gpu"]
    paths = filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
