"""The operands of a fused operation: their type, their limits, and the checks of a call."""

import dataclasses
import json
import math
import numbers
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jax_gemma_arf._src.mesh import AxisName, axis_names

# The limits of the kernels (ffi/call_limits.h): how many ranks, which D, how many norms of the
# finished row, how many bytes of partial sums on one rank, and how many of these in one-shot.
AXIS_SIZES = (2, 4, 8)
WIDTH_MULTIPLE, MIN_WIDTH, MAX_WIDTH = 64, 256, 16384
MAX_NEXT_NORMS = 3
MAX_MESSAGE_BYTES = 256 << 20
MAX_ONE_SHOT_BYTES = 64 << 20

#: Limits of one-shot, and how they were measured; bench/op.py --write-thresholds writes the file.
THRESHOLDS = Path(__file__).with_name("one_shot_max_bytes.json")


def read_thresholds(path: Path) -> dict[tuple[str, int], int]:
    """Returns the bytes in a file of thresholds, by device kind and number of ranks."""
    return {
        (kind, int(ranks)): entry["bytes"]
        for kind, entries in json.loads(path.read_text()).items()
        for ranks, entry in entries.items()
    }


#: Bytes of partial sums on one rank up to which one-shot is used, by device kind and number of
#: ranks. One-shot pushes N - 1 messages and waits once; two-shot pushes 2 (N - 1) / N and waits
#: twice.
ONE_SHOT_MAX_BYTES = read_thresholds(THRESHOLDS)

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
Implementation = Literal["cuda", "flashinfer", "xla"]
#: The public operations, by name.
Operation = Literal["fused_post_ff", "fused_sandwich", "fused_all_reduce_norm", "fused_moe_tail"]
#: Partial sums that an operation reduces, one for each branch.
BRANCHES: dict[str, int] = dict.fromkeys(get_args(Operation), 1) | {"fused_moe_tail": 2}


class Operands(NamedTuple):
    """Operands of a fused tail; which of them are there says which tail it is.

    As a pytree, its leaves in this order are the operands of the primitive and of the FFI call.

    Attributes:
      partial_sums: [..., D] each, all of one dtype: this rank's, of one branch or of two.
      norm_scales: [D] each: of one branch, its norm; of two, the norms of both and of their sum.
        None at all: the sum of one branch is the result, as a derivative needs it.
      residual: [..., D], or None.
      layer_scalar: () or (1,), or None for 1.
      next_norm_scales: [D] each, up to three: the norms that read the finished row.
    """

    partial_sums: tuple[jax.Array, ...]
    norm_scales: tuple[jax.Array, ...]
    residual: jax.Array | None = None
    layer_scalar: jax.Array | None = None
    next_norm_scales: tuple[jax.Array, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all results: residual's, or without a residual the partial sums'."""
        return (self.partial_sums[0] if self.residual is None else self.residual).dtype


def as_operands(
    partial_sums, norm_scales, residual=None, layer_scalar=None, next_norm_scale=None
) -> Operands:
    """Returns an operation's arguments as arrays."""
    if next_norm_scale is None:
        next_norm_scales = ()
    elif not isinstance(next_norm_scale, tuple | list):
        next_norm_scales = (next_norm_scale,)
    elif 1 <= len(next_norm_scale) <= MAX_NEXT_NORMS:
        next_norm_scales = next_norm_scale
    else:
        raise ValueError(
            f"next_norm_scale must be an array [D] or a tuple or list of 1 to {MAX_NEXT_NORMS}, "
            f"got {len(next_norm_scale)}"
        )
    return Operands(
        tuple(map(jnp.asarray, partial_sums)),
        tuple(map(jnp.asarray, norm_scales)),
        residual,
        None if layer_scalar is None else as_array(layer_scalar),
        tuple(map(jnp.asarray, next_norm_scales)),
    )


def as_array(layer_scalar: jax.Array | float) -> jax.Array:
    """A number of Python, or an integer of NumPy, becomes float32, whatever JAX's default is."""
    number = isinstance(layer_scalar, numbers.Integral | float)
    return jnp.asarray(layer_scalar, jnp.float32 if number else None)


def branches_of(op: str) -> int:
    """Returns how many partial sums the operation of that name reduces."""
    if op not in BRANCHES:
        raise ValueError(f"op must be one of {', '.join(BRANCHES)}, got {op!r}")
    return BRANCHES[op]


def check_number(name: str, value: float) -> float:
    """value as the float32 that the arithmetic will see."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a static number, got {type(value).__name__}")
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite in float32, got {value}")
    return number


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The names that partial sums and scales have as arguments of an operation, for errors."""

    sums: tuple[str, ...]
    scales: tuple[str, ...]


ONE_BRANCH = Arguments(("x",), ("norm_scale",))
TWO_BRANCHES = Arguments(
    ("dense", "experts"), ("dense_norm_scale", "expert_norm_scale", "norm_scale")
)


class _Named(NamedTuple):
    """The operands by the names of the arguments that they were."""

    sums: dict[str, jax.Array]
    residual: dict[str, jax.Array]
    scales: dict[str, jax.Array]
    scalar: dict[str, jax.Array]

    @classmethod
    def of(cls, operands: Operands, arguments: Arguments) -> "_Named":
        following: tuple[str, ...] = ("next_norm_scale",)
        if len(operands.next_norm_scales) > 1:
            following = tuple(f"next_norm_scale[{i}]" for i in range(MAX_NEXT_NORMS))
        scales = (*operands.norm_scales, *operands.next_norm_scales)
        return cls(
            dict(zip(arguments.sums, operands.partial_sums)),
            {} if operands.residual is None else {"residual": operands.residual},
            dict(zip((*arguments.scales, *following), scales)),
            {} if operands.layer_scalar is None else {"layer_scalar": operands.layer_scalar},
        )


def check_operands(operands: Operands, arguments: Arguments) -> None:
    """Checks shapes and dtypes. No operand is converted silently, or read as another dtype."""
    named = _Named.of(operands, arguments)
    x_name, x = next(iter(named.sums.items()))
    if x.ndim == 0:
        raise ValueError(f"{x_name} must be [..., D], got the shape ()")
    width = x.shape[-1]
    if width == 0:
        raise ValueError(f"{x_name} must have D > 0 elements a token, got the shape {x.shape}")
    for name, operand in (named.sums | named.residual).items():
        if operand.shape != x.shape:
            raise ValueError(f"{name} must have {x_name}'s shape {x.shape}, got {operand.shape}")
    for name, operand in named.scales.items():
        if operand.shape != (width,):
            raise ValueError(
                f"{name} must have the shape ({width},) for {x_name} of shape {x.shape}, "
                f"got {operand.shape}"
            )
    for name, operand in named.scalar.items():
        if operand.shape not in ((), (1,)):
            raise ValueError(f"{name} must have the shape () or (1,), got {operand.shape}")
    _check_dtypes(named)


def _check_dtypes(named: _Named) -> None:
    everything = named.sums | named.residual | named.scales | named.scalar
    for name, operand in everything.items():
        if operand.dtype not in DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {operand.dtype}")
    if {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)} <= {a.dtype for a in everything.values()}:
        dtypes = ", ".join(f"{name} {operand.dtype}" for name, operand in everything.items())
        raise TypeError(f"bfloat16 and float16 must not be mixed in one call, got {dtypes}")
    if len({operand.dtype for operand in named.sums.values()}) > 1:
        dtypes = " and ".join(str(operand.dtype) for operand in named.sums.values())
        raise TypeError(f"{' and '.join(named.sums)} must have one dtype, got {dtypes}")


def check_axis(axis_name: AxisName) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    manual = [name for name, kind in kinds.items() if kind == AxisType.Manual]
    if not manual:
        raise ValueError(
            f"must be called inside jax.shard_map over axis_name, got {axis_name!r} where no axis "
            "is manual"
        )
    names = axis_names(axis_name, mesh)
    if not set(names) <= set(manual):
        raise ValueError(
            f"axis_name must name manual axes, which are {manual} here, got {axis_name!r}; call "
            "inside jax.shard_map over that axis"
        )
    return names


# To find what is constant, Flax traces the body of a scan once more, with types that have no manual
# axes.
_OF_SCAN = (
    ", or Flax's nn.scan dropped its manual axes: pass check_constancy_invariants=False to nn.scan "
    "(nn.remat_scan has no such option: use nn.scan of nn.remat)"
)


def check_replication(operands: Operands, arguments: Arguments, names: tuple[str, ...]) -> None:
    """Partial sums must be partial over the axes and the rest replicated, as far as check_vma lets
    us see."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {name for name in names if mesh.shape[name] > 1}  # types leave out axes of size 1
    # Only under check_vma does a type say what varies; the rank's own index shows whether it is on.
    index = jax.eval_shape(lambda: jax.lax.axis_index(names)).manual_axis_type
    if index is None or not axes <= index.varying:
        return
    named = _Named.of(operands, arguments)
    for name, operand in (named.residual | named.scales | named.scalar).items():
        kind = jax.typeof(operand).manual_axis_type
        if over := (kind.varying | kind.unreduced | kind.reduced) & axes:
            raise ValueError(
                f"{name} must be replicated over axis_name, got one that varies over or is typed "
                f"unreduced or reduced over {sorted(over)}; reduce or gather it first"
            )
    for name, operand in named.sums.items():
        kind = jax.typeof(operand).manual_axis_type
        if not axes <= kind.varying and not axes <= kind.unreduced:
            raise ValueError(
                f"{name} must hold partial sums, varying or unreduced over all of {sorted(axes)}, "
                f"got one varying over {sorted(kind.varying & axes)} and unreduced over "
                f"{sorted(kind.unreduced & axes)}: it is reduced already, or lacks jax.lax.pcast"
                + ("" if kind.varying & axes else _OF_SCAN)
            )
        if other := kind.unreduced - set(names):
            raise ValueError(
                f"{name} must be unreduced over axis_name alone, got one unreduced over "
                f"{sorted(other)} too"
            )
