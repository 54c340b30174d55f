"""Lets a model that is written for Auto mode be called in either mode of a mesh.

In Explicit mode, the default of ``jax.make_mesh``, the type of an array says how the array is
sharded, and JAX refuses to combine types of different modes. The model runs in Auto mode:
``in_auto_mode`` converts what enters it, ``in_mode_of`` and ``without_mesh`` what leaves it. None
of them moves data, but for results that Explicit mode needs whole.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def callers_mesh(mesh: Mesh, arguments: Any = ()) -> Mesh | None:
    """Returns the mesh that types the results of a call, or None if no mesh does.

    Args:
      mesh: the model's mesh, in any mode.
      arguments: a tree; its arrays may be tracers.

    Returns:
      mesh in the mode of the context mesh (``jax.set_mesh``), or without a context mesh in the mode
      of the first argument in Explicit mode.

    Raises:
      ValueError: if that mesh has other axes than mesh, or inside ``jax.shard_map``.
    """
    context = jax.sharding.get_abstract_mesh()
    explicit = (_type_mesh(array) for array in _arrays(arguments) if _is_explicit(array))
    found = next(explicit, None) if context.empty else context
    if found is None:
        return None
    if found.manual_axes:
        raise ValueError(
            "a tensor parallel model must be called outside of jax.shard_map, because it opens one "
            f"over all axes of its mesh; got a call inside one, over {found.manual_axes}"
        )
    if tuple(found.shape.items()) != tuple(mesh.shape.items()):
        source = "an argument" if context.empty else "the context (jax.set_mesh)"
        raise ValueError(
            f"the mesh of {source} must be the one that tensor_parallel was given, "
            f"{dict(mesh.shape)}, got {dict(found.shape)}; build the model on the mesh that you "
            "use, or leave the context before you call it"
        )
    return mesh.update(axis_types=found.axis_types)


def any_explicit(tree: Any) -> bool:
    """Returns whether the type of an array in tree names a mesh with axes in Explicit mode."""
    return any(map(_is_explicit, _arrays(tree)))


def has_arrays(tree: Any) -> bool:
    """Returns whether tree holds arrays of JAX or NumPy."""
    return any(True for _ in _arrays(tree))


def sharding_in_auto_mode(sharding: Any) -> Any:
    """Returns a NamedSharding on its mesh in Auto mode, and anything else as it is."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh.update(axis_types=(AxisType.Auto,) * len(sharding.mesh.axis_names))
    return NamedSharding(mesh, sharding.spec)


def blank(tree: Any) -> Any:
    """Returns tree with zeros in place of the arrays in Explicit mode, for ``init``."""
    return _map_explicit(lambda array: jnp.zeros(array.shape, array.dtype), tree)


def in_auto_mode(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Returns tree with the arrays in Explicit mode typed by mesh, which is in Auto mode."""
    anywhere = NamedSharding(mesh, P())  # in Auto mode, no constraint
    return _map_explicit(lambda array: jax.sharding.reshard(array, anywhere), tree)


def in_mode_of(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Returns a tree of arrays in Auto mode typed by mesh, sharded by specs over Explicit axes."""
    explicit = set(mesh.explicit_axes)

    def only_explicit(names):
        names = names if isinstance(names, tuple) else (names,)
        return names if explicit.issuperset(names) else None

    def convert(array, spec):
        spec = P(*map(only_explicit, spec))
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))

    return jax.tree.map(convert, tree, specs) if explicit else tree


def without_mesh(tree: Any) -> Any:
    """Returns a tree of arrays in Auto mode typed by no mesh, as arrays are that nobody has placed.

    Inside ``jax.jit`` they combine with arrays in either mode, and XLA still shards them. Concrete
    arrays keep their sharding, and therefore their mesh.
    """
    return jax.tree.map(without_mesh_p.bind, tree)


def _transpose(cotangent, primal):
    """Converts the cotangent, whose mode comes from whatever the result was combined with."""
    return (in_auto_mode(primal.aval.sharding.mesh, cotangent),)


without_mesh_p = Primitive("without_mesh")
without_mesh_p.def_impl(lambda x: x)
without_mesh_p.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype, weak_type=x.weak_type))
mlir.register_lowering(without_mesh_p, lambda ctx, x: [x])
batching.defvectorized(without_mesh_p)
ad.deflinear2(without_mesh_p, _transpose)


def _map_explicit(function: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: function(leaf) if _is_array(leaf) and _is_explicit(leaf) else leaf, tree
    )


def _arrays(tree: Any) -> Iterator[Any]:
    return filter(_is_array, jax.tree.leaves(tree))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray))


def _type_mesh(array: Any) -> AbstractMesh:
    return jax.typeof(array).sharding.mesh


def _is_explicit(array: Any) -> bool:
    return bool(_type_mesh(array).explicit_axes)
