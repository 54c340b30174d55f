"""What a jax.profiler trace says ran on the GPUs."""

from pathlib import Path

import jax


def kernels_in(trace_directory: Path) -> list[str]:
    """Names of the kernels on all GPUs, and their launch configurations, such as "grid:8,1,1"."""
    (path,) = trace_directory.glob("**/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    return [
        f"{event.name} {dict(event.stats).get('kernel_details', '')}"
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
