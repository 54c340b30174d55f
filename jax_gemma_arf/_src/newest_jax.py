"""The newest JAX that this package has been tested with, and the warning above it."""

import warnings

import jax

#: Raise it after the tests, those on GPUs included, have passed with a newer release.
NEWEST_JAX = "0.12.0.1"


def warn_if_newer() -> None:
    """Warns if the installed JAX is newer than NEWEST_JAX."""
    if jax.__version_info__ > tuple(map(int, NEWEST_JAX.split("."))):
        warnings.warn(
            f"jax_gemma_arf has been tested with JAX up to {NEWEST_JAX}, this is "
            f"{jax.__version__}; if something breaks, install that JAX or a newer jax_gemma_arf",
            stacklevel=3,
        )
