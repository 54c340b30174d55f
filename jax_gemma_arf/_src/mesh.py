"""Geometry of meshes: the axes of a call, its ranks, and its replica groups."""

import math

import jax
import numpy as np

AxisName = str | tuple[str, ...]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def axis_names(axis_name: AxisName, mesh: AnyMesh, argument: str = "axis_name") -> tuple[str, ...]:
    """Returns axis_name as a tuple, after checking that it names different axes of the mesh.

    Raises:
      ValueError: if it does not; the error calls it argument.
    """
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not names or len(set(names)) != len(names) or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"{argument} must name one or several different axes of the mesh {mesh.axis_names}, "
            f"got {axis_name!r}"
        )
    return names


def group_size(mesh: AnyMesh, names: tuple[str, ...]) -> int:
    """The number of ranks in a replica group."""
    return math.prod(mesh.shape[name] for name in names)


def replica_groups(mesh: AnyMesh, names: tuple[str, ...]) -> np.ndarray:
    """[groups, ranks]: positions in the mesh, in row-major order, of each group's ranks."""
    ids = np.arange(mesh.size, dtype=np.int64).reshape(mesh.axis_sizes)
    axes = [mesh.axis_names.index(name) for name in names]
    return np.moveaxis(ids, axes, range(-len(axes), 0)).reshape(-1, group_size(mesh, names))


def quoted(names: tuple[str, ...]) -> str:
    """Returns the names of axes as an error shows them."""
    return " x ".join(map(repr, names))
