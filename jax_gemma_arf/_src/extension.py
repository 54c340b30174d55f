"""Loads the compiled parts and registers their handlers with JAX.

There are two: ``_ffi`` holds the kernels of this library (implementation "cuda"), ``_flashinfer``,
which only some builds have, FlashInfer's kernels with the same epilogue ("flashinfer").
"""

import dataclasses
import functools
import importlib
import os
import types

import jax
import jaxlib.version

from jax_gemma_arf._version import __version__


def is_set(variable: str, *, default: bool = False) -> bool:
    """Returns whether a switch in the environment is on: set to anything but 0."""
    return os.environ.get(variable, str(int(default))) not in ("", "0")


def _reason_of_the_build() -> str:
    """Returns the reason that CMakeLists.txt wrote down when it left the extension out."""
    try:
        return importlib.import_module("jax_gemma_arf._not_built").REASON
    except ModuleNotFoundError:
        return "this is a source tree; install the package (pip install ., or make build)"


_BUILD_FLASHINFER = (
    "FlashInfer's kernels were not built; in a checkout: make flashinfer, or "
    "pip install . -C cmake.define.JAX_GEMMA_ARF_FLASHINFER=ON"
)
_modules: dict[str, types.ModuleType] = {}
_why_missing: dict[str, str] = {}


def _import(implementation: str, name: str, not_built: str) -> None:
    try:
        module = importlib.import_module(f"jax_gemma_arf.{name}")
    except ModuleNotFoundError:
        _why_missing[implementation] = not_built
        return
    except ImportError as error:
        _why_missing[implementation] = f"the extension {name} does not load: {error}"
        return
    if module.__version__ != __version__:
        raise ImportError(
            f"jax_gemma_arf is {__version__} but its compiled part {name} was built for "
            f"{module.__version__}; reinstall the package: pip install --force-reinstall --no-deps "
            "jax-gemma-arf (in a checkout: make build)"
        )
    _modules[implementation] = module


_import("cuda", "_ffi", f"the extension was not built: {_reason_of_the_build()}")
_import("flashinfer", "_flashinfer", _BUILD_FLASHINFER)


#: Set to 0 to have XLA capture the kernels into child graphs of its CUDA graphs, and to launch none
#: of them programmatically.
RECORD_VARIABLE = "JAX_GEMMA_ARF_RECORD"

#: Kernels are launched programmatically, as nodes of XLA's CUDA graphs. XLA's interface for it is
#: under development, so a jaxlib newer than those tested captures.
RECORD = is_set(RECORD_VARIABLE, default=True) and jaxlib.version.__version_info__ < (0, 13)

# At import, not at the first lowering: a program that another process exported or compiled is never
# lowered here. JAX keeps the registrations until its CUDA plugin is loaded.
for _module in _modules.values():
    _module.set_record(RECORD)
    for _name, _registration in _module.type_registrations().items():
        jax.ffi.register_ffi_type(_name, _registration, platform="CUDA")
    for _name, _stages in _module.registrations().items():
        jax.ffi.register_ffi_target(_name, _stages, platform="CUDA")


def load(implementation: str = "cuda") -> types.ModuleType | None:
    """Returns the extension of an implementation, or None if it was not built."""
    return _modules.get(implementation)


def why_missing(implementation: str = "cuda") -> str | None:
    """Returns why an implementation has no extension, or None if it has one."""
    return _why_missing.get(implementation)


@functools.cache
def nvlink_peers() -> list[list[bool]]:
    """[i][j]: whether the i-th GPU that this process sees reaches the j-th over NVLink.

    The driver is asked once. Empty without the extension.
    """
    built = load()
    return [] if built is None else built.nvlink_peers()


def set_peer_timeout(seconds: float | None) -> None:
    """Sets how long a kernel waits for a rank of its replica group before it gives up.

    A rank that ended, hangs or runs another program never comes. A kernel that gives up stops its
    GPU with an error, which the run that called it raises, and says on stderr which rank waited for
    which, in what call; the process must then be restarted. Kernels that are enqueued, or captured
    into a CUDA graph, afterwards have the new bound. Without the extension it does nothing, and
    FlashInfer's kernels (implementation="flashinfer") wait without a bound.

    Args:
      seconds: more than any rank may be behind another, by writing a checkpoint or compiling
        another program between two steps, say; 60 if never set. None waits without a bound.

    Raises:
      ValueError: if seconds is not from a millisecond to a day.
    """
    if seconds is not None and not 1e-3 <= seconds <= 86400:
        raise ValueError(f"seconds must be None or from 0.001 to 86400, got {seconds}")
    for module in _modules.values():
        module.set_timeout(0.0 if seconds is None else float(seconds))


@dataclasses.dataclass(frozen=True)
class Workspace:
    """One rank's part of a workspace: peer-mapped device memory, outside JAX's own pool.

    Attributes:
      implementation: "cuda" or "flashinfer".
      device: CUDA ordinal.
      rank: index in the replica group, from 0.
      nranks: number of ranks in the replica group.
      algorithm: "one_shot" or "two_shot".
      capacity: size of the largest message, in bytes.
      bytes: size of the device memory, in bytes.
      base: address of the device memory.
      damage: "" if the guard words around the slots are intact, else which of them a stray write
        of some kernel changed.
    """

    implementation: str
    device: int
    rank: int
    nranks: int
    algorithm: str
    capacity: int
    bytes: int
    base: int
    damage: str


def workspaces() -> list[Workspace]:
    """Returns the workspaces of this process, one record for each rank's part.

    Waits for the GPUs, to read the guard words.
    """
    return [
        Workspace(implementation, **part)
        for implementation, module in _modules.items()
        for part in module.workspaces()
    ]
