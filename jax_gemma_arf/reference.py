"""Deprecated: ``Operands`` is in jax_gemma_arf.loopback, all else in jax_gemma_arf."""

from jax_gemma_arf._src import moved as _moved

__getattr__ = _moved.getter(
    __name__,
    {
        "Operands": "jax_gemma_arf.loopback",
        "reference_post_ff": "jax_gemma_arf",
        "rmsnorm": "jax_gemma_arf",
    },
)
