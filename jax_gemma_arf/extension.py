"""Loads the compiled part and registers its handlers with JAX."""

import functools
import importlib
import types

import jax

from jax_gemma_arf._version import __version__

try:
    _ffi = importlib.import_module("jax_gemma_arf._ffi")
except ImportError as error:
    _ffi = None
    _why_missing = (
        "the extension was not built (no nvcc at installation, or a source tree, not installed)"
        if isinstance(error, ModuleNotFoundError)
        else f"the extension does not load: {error}"
    )

if _ffi is not None and _ffi.__version__ != __version__:
    raise ImportError(
        f"jax_gemma_arf is {__version__} but its compiled part was built for {_ffi.__version__}; "
        "reinstall the package: pip install --force-reinstall --no-deps jax-gemma-arf "
        "(in a checkout: make build)"
    )


@functools.cache
def load() -> types.ModuleType | None:
    """The extension with its handlers registered for CUDA, or None if it was not built."""
    if _ffi is None:
        return None
    for name, registration in _ffi.type_registrations().items():
        jax.ffi.register_ffi_type(name, registration, platform="CUDA")
    for name, stages in _ffi.registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")
    return _ffi


def why_missing() -> str | None:
    """Why there is no extension, or None if there is one."""
    return None if _ffi is not None else _why_missing
