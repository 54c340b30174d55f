"""Deprecated: ``Support`` and ``fusion_support`` are in jax_gemma_arf."""

from jax_gemma_arf._src import moved as _moved

__getattr__ = _moved.getter(
    __name__, {"Support": "jax_gemma_arf", "fusion_support": "jax_gemma_arf"}
)
