"""Kernels that a jax.profiler trace shows on the GPUs."""

from pathlib import Path

import jax


def kernels_in(trace_directory: Path) -> list[str]:
    """Names of the kernels on all GPUs, from the trace written below trace_directory."""
    (path,) = trace_directory.glob("**/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    return [
        event.name
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
