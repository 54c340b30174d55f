"""Shared cases, oracles and tolerance, for every implementation of every tail.

Two oracles that share no code with the library: NumPy in float64, and Flax's RMSNorm. The tolerance
is derived from the numerics contract (see `hidden_bound`), not tuned.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)

GEMMA_WIDTHS = (640, 1152, 1536, 2560, 2816, 3840, 5376)
OPS = ("post_ff", "sandwich", "all_reduce_norm", "moe_tail")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of fused_{op}: shapes, dtypes and options.

    `special` plants values into the partial sums, see `make_inputs`.
    """

    leading: tuple[int, ...] = (3,)
    width: int = 640
    dtype: np.dtype = BF16
    residual_dtype: np.dtype | None = None
    scale_dtype: np.dtype | None = None
    layer_scalar: tuple[int, ...] | None = ()
    eps: float = 1e-6
    scale_offset: float = 0.0
    special: str = ""
    seed: int = 0
    op: str = "post_ff"
    next_norms: int = 0

    def __post_init__(self) -> None:
        assert self.op in OPS
        if self.op == "sandwich":
            assert self.next_norms > 0
        elif self.op != "moe_tail":
            assert self.next_norms == 0

    @property
    def branches(self) -> int:
        return 2 if self.op == "moe_tail" else 1

    @property
    def has_residual(self) -> bool:
        return self.op != "all_reduce_norm"

    @property
    def has_layer_scalar(self) -> bool:
        return self.has_residual and self.layer_scalar is not None

    def __str__(self) -> str:
        parts = ["x".join(map(str, (*self.leading, self.width))), self.dtype.name]
        if self.op != "post_ff":
            parts.insert(0, self.op)
        if self.next_norms:
            parts.append(f"next_{self.next_norms}")
        if self.residual_dtype not in (None, self.dtype):
            parts.append(f"residual_{self.residual_dtype.name}")
        if self.scale_dtype not in (None, self.dtype):
            parts.append(f"scale_{self.scale_dtype.name}")
        if self.layer_scalar is None:
            parts.append("no_scalar")
        if self.scale_offset:
            parts.append(f"offset_{self.scale_offset:g}")
        if self.special:
            parts.append(self.special)
        return "-".join(parts)


class Inputs(NamedTuple):
    """The arrays of a case, or what stands for each of them: a shape, a spec, an axis.

    The same fields as the library's Operands, with all ranks' sums.
    """

    partial_sums: Any  # a tuple, [N, *leading, D] each, one slice a rank
    norm_scales: Any  # a tuple
    residual: Any
    layer_scalar: Any
    next_norm_scales: Any  # a tuple

    @property
    def dtype(self) -> np.dtype:
        return (self.partial_sums[0] if self.residual is None else self.residual).dtype

    def tokens(self, start: int, stop: int) -> "Inputs":
        """Returns the inputs of some tokens of a case with one leading axis."""
        return self._replace(
            partial_sums=tuple(x[:, start:stop] for x in self.partial_sums),
            residual=None if self.residual is None else self.residual[start:stop],
        )


# NaN, NaN with all bits set, and so on; see `plant`.
SPECIALS = ("nan", "sentinel", "inf", "negative_zero", "denormal", "large", "zero")
WIDTHS = ((1, 640), (7, 5376), (66, 2816))

CASES = [
    # Gemma's widths, decode and small prefill, odd counts (hazards 1 and 5).
    *(Case((tokens,), width) for width in (640, 2816, 5376) for tokens in (1, 7, 66)),
    Case((1,), 1536),
    Case((2,), 2560),
    Case((129,), 1536),
    Case((33,), 3840),
    Case((5,), 1152),
    # The four tails: with scalar, (1,), none; Gemma 2 and 3's 1 + w.
    Case((4,), 2560, layer_scalar=(1,)),
    Case((4,), 2560, layer_scalar=None),
    Case((4,), 2560, layer_scalar=None, scale_offset=1.0),
    Case((4,), 2560, eps=1e-3),
    # Any leading shape.
    Case((), 640),
    Case((2, 3), 640),
    Case((1, 2, 1, 3), 256),
    # Dtypes; float32 may meet either of the others (hazard 20). Wide float32 rows take a cluster.
    *(Case((5,), 2816, dtype) for dtype in (F16, F32)),
    Case((3,), 5376, F32),
    Case((3,), 8192, BF16),
    Case((2,), 16384, F32),
    Case((3,), 640, BF16, residual_dtype=F32),
    Case((3,), 640, F32, residual_dtype=BF16),
    Case((3,), 640, F32, residual_dtype=F16, scale_dtype=F16),
    Case((3,), 640, BF16, scale_dtype=F32),
    Case((3,), 640, F16, residual_dtype=F32, scale_dtype=F16),
    # The other tails: one next norm and several, with and without what is optional, odd counts.
    *(Case((tokens,), width, op="sandwich", next_norms=1) for tokens, width in WIDTHS),
    *(Case((4,), 2560, op="sandwich", next_norms=count) for count in (2, 3)),
    Case((4,), 2560, op="sandwich", next_norms=1, layer_scalar=None, scale_offset=1.0, eps=1e-3),
    *(Case((tokens,), width, op="all_reduce_norm") for tokens, width in WIDTHS),
    Case((4,), 2560, op="all_reduce_norm", scale_offset=1.0, eps=1e-3),
    *(Case((tokens,), width, op="moe_tail") for tokens, width in WIDTHS),
    *(Case((7,), 2816, op="moe_tail", next_norms=count) for count in (1, 2, 3)),
    Case((4,), 2560, op="moe_tail", layer_scalar=None, scale_offset=1.0, eps=1e-3),
    *(
        dataclasses.replace(Case(leading, width, op=op, next_norms=count), **changes)
        for op, count in (("sandwich", 1), ("all_reduce_norm", 0), ("moe_tail", 3))
        for leading, width, changes in (
            ((), 640, {"layer_scalar": (1,)}),
            ((2, 3), 256, {"dtype": F16}),
            ((5,), 2816, {"dtype": F32}),
            ((2,), 8192, {"dtype": F32}),
            ((3,), 640, {"dtype": BF16, "residual_dtype": F32}),
            ((3,), 640, {"dtype": F32, "residual_dtype": F16, "scale_dtype": F16}),
            ((3,), 640, {"dtype": BF16, "scale_dtype": F32}),
        )
    ),
    # Values that protocols stumble over: those that may mark an empty slot (hazard 31).
    *(
        Case((6,), 640, dtype, special=special)
        for dtype in (BF16, F16, F32)
        for special in SPECIALS
    ),
    *(
        Case((6,), 640, special=special, op=op, next_norms=count)
        for op, count in (("sandwich", 1), ("all_reduce_norm", 0), ("moe_tail", 1))
        for special in SPECIALS
    ),
]


def make_inputs(case: Case, ranks: int) -> Inputs:
    """Random operands. Residual and normed row are of one size, so that their order matters; two
    branches are not, so that it matters where they are added."""
    rng = np.random.default_rng([case.seed, ranks, case.width, *case.leading])
    shape = (*case.leading, case.width)
    scale_dtype = case.scale_dtype or case.dtype

    def norm_scale() -> np.ndarray:
        scale = 1 - case.scale_offset + 0.25 * rng.standard_normal(case.width)
        return scale.astype(scale_dtype)

    partial_sums = []
    for branch in range(case.branches):
        x = (1 + 3 * branch) * rng.standard_normal((ranks, *shape))
        partial_sums.append(plant(case, x, rng))
    residual = layer_scalar = None
    if case.has_residual:
        residual = rng.standard_normal(shape).astype(case.residual_dtype or case.dtype)
    if case.has_layer_scalar:
        layer_scalar = np.full(case.layer_scalar or (), 0.625 + 0.125 * rng.random(), scale_dtype)
    return Inputs(
        partial_sums=tuple(partial_sums),
        norm_scales=tuple(norm_scale() for _ in range(2 * case.branches - 1)),
        residual=residual,
        layer_scalar=layer_scalar,
        next_norm_scales=tuple(norm_scale() for _ in range(case.next_norms)),
    )


def plant(case: Case, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x with the case's special values, in its dtype. Rows of no special value stay."""
    flat = x.reshape(len(x), -1, case.width)
    row = flat.shape[1] // 2
    match case.special:
        case "nan":
            flat[0, row, 3] = np.nan
        case "inf":
            flat[-1, row, 5] = np.inf
            flat[0, 0, 1] = -np.inf
        case "negative_zero":
            flat[:] = np.where(rng.random(flat.shape) < 0.5, -0.0, flat)
            flat[:, row] = -0.0
        case "denormal":
            flat[:, row] *= float(ml_dtypes.finfo(case.dtype).smallest_subnormal) * 8
        case "large":  # squares overflow float16, not float32
            flat[:, row] *= 3e3
        case "zero":
            flat[:, row] = 0.0
    out = x.astype(case.dtype)
    if case.special == "sentinel":  # NaN with all bits set, from one rank and from all
        bits = out.reshape(flat.shape).view(np.uint8)
        bits[-1, 0] = 0xFF
        bits[:, row] = 0xFF
    return out


def rank_sum(x: np.ndarray) -> np.ndarray:
    """Float32 sum in rank order, rounded once to x's dtype: point 1 of the contract."""
    total = np.zeros(x.shape[1:], np.float32)
    for part in x:
        total = total + part.astype(np.float32)
    return total.astype(x.dtype)


def rmsnorm(row: np.ndarray, scale: np.ndarray | float, eps: float = 1e-6) -> np.ndarray:
    """The formula, in the dtype of its operands."""
    return row / np.sqrt((row * row).mean(-1, keepdims=True) + eps) * scale


# A norm takes a case, rows and their norm_scale, and returns the scaled rows, wide.


def norm_float64(case: Case, row: np.ndarray, norm_scale: np.ndarray) -> np.ndarray:
    scale = case.scale_offset + norm_scale.astype(np.float64)
    return rmsnorm(row.astype(np.float64), scale, case.eps)


def norm_flax(case: Case, row: np.ndarray, norm_scale: np.ndarray) -> np.ndarray:
    with jax.default_device(jax.devices("cpu")[0]):
        scale = jnp.asarray(case.scale_offset + norm_scale.astype(np.float32))
        norm = nn.RMSNorm(epsilon=case.eps, dtype=jnp.float32)
        rows = jnp.asarray(row.astype(np.float32))
        return np.asarray(norm.apply({"params": {"scale": scale}}, rows))


def compose(case: Case, inputs: Inputs, summed, norm):
    """hidden of the reduced rows, before its rounding, as wide as the norm."""
    *branch_scales, norm_scale = inputs.norm_scales
    row = summed[0]
    if branch_scales:
        row = norm(case, summed[0], branch_scales[0]) + norm(case, summed[1], branch_scales[1])
    return finish(inputs, norm(case, row, norm_scale))


def finish(inputs: Inputs, out):
    """Residual and scalar."""
    if inputs.residual is not None:
        out = out + inputs.residual.astype(out.dtype)
    if inputs.layer_scalar is not None:
        out = out * inputs.layer_scalar.astype(out.dtype).reshape(())
    return out


def oracle(case: Case, inputs: Inputs, norm=norm_float64) -> np.ndarray:
    """hidden by the contract, before the last rounding."""
    with np.errstate(invalid="ignore"):
        return compose(case, inputs, [rank_sum(x) for x in inputs.partial_sums], norm)


def outputs_of(case: Case, inputs: Inputs, hidden: np.ndarray) -> list[np.ndarray]:
    """All outputs for a hidden that is not rounded yet, rounded where the contract says."""
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = hidden.astype(inputs.dtype)
        normed = [norm_float64(case, rounded, scale) for scale in inputs.next_norm_scales]
        return [rounded, *(row.astype(inputs.dtype) for row in normed)]


def mistakes(case: Case, inputs: Inputs) -> dict[str, list[np.ndarray]]:
    """Outputs of tails that look right and are not, by what is wrong. None may ever pass."""
    summed = [rank_sum(x) for x in inputs.partial_sums]
    *branch_scales, norm_scale = inputs.norm_scales
    wrong = {}
    if case.has_residual:  # what a Llama-style fusion computes
        row = summed[0].astype(np.float64)
        if case.branches == 2:
            row = sum(norm_float64(case, *pair) for pair in zip(summed, branch_scales))
        normed = norm_float64(case, row + inputs.residual.astype(np.float64), norm_scale)
        wrong["add, then norm"] = finish(inputs._replace(residual=None), normed)
    if case.branches == 2:
        both = summed[0].astype(np.float64) + summed[1].astype(np.float64)
        for name, scale in zip(("dense", "expert"), branch_scales):
            normed = norm_float64(case, norm_float64(case, both, scale), norm_scale)
            wrong[f"branches added before the {name} norm"] = finish(inputs, normed)
        swapped = inputs._replace(norm_scales=(*branch_scales[::-1], norm_scale))
        wrong["branches' scales swapped"] = oracle(case, swapped)
        normed = sum(norm_float64(case, *pair) for pair in zip(summed, branch_scales))
        wrong["sum of the branches not normed"] = finish(inputs, normed)
    outputs = {name: outputs_of(case, inputs, hidden) for name, hidden in wrong.items()}
    if case.next_norms and inputs.dtype != F32:
        hidden = oracle(case, inputs)
        normed = [norm_float64(case, hidden, scale) for scale in inputs.next_norm_scales]
        outputs["next norm of the row before its rounding"] = [
            row.astype(inputs.dtype) for row in (hidden, *normed)
        ]
    if case.next_norms > 1:
        swapped = inputs._replace(next_norm_scales=inputs.next_norm_scales[::-1])
        outputs["next norms swapped"] = outputs_of(case, swapped, oracle(case, inputs))
    return outputs


# What 16 float32 roundings can do, relative to a term: the row sum, rsqrt, and products and sums.
FLOAT32_ERROR = 16 * 2.0**-24
# XLA takes float32 subnormals for zero on CPUs: sums, and the terms of a sum on 8 ranks.
FLUSHED = 9 * float(ml_dtypes.finfo(np.float32).smallest_normal)


def _half_ulp(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The largest error of rounding to dtype."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), float(info.smallest_normal))))
    return float(info.eps) / 2 * 2.0**exponent


def _norm_error(case: Case, row, error, norm_scale) -> np.ndarray:
    """How far a norm computed in float32 may be off for a row that is off by up to error.

    The row's error is scaled with it. The mean of squares moves the root mean square by no more
    than the error's own.
    """
    row = row.astype(np.float64)
    inverse_rms = 1 / np.sqrt((row * row).mean(-1, keepdims=True) + case.eps)
    scale = np.abs(case.scale_offset + norm_scale.astype(np.float64))
    error = error + FLUSHED
    relative = np.sqrt((error * error).mean(-1, keepdims=True)) * inverse_rms + FLOAT32_ERROR
    return (error + np.abs(row) * relative) * inverse_rms * scale


def hidden_bound(case: Case, inputs: Inputs, expected: np.ndarray, *, exact_sum: bool):
    """How far hidden may be from an oracle.

    - Half a unit in the last place of its dtype: the final rounding.
    - Float32 roundings of the terms, before they cancel: FLOAT32_ERROR each. This is all there is
      for float32 outputs. The branches' carry through the norm of their sum.
    - Without an exact sum (psum in its dtype over more than two ranks): N - 1 roundings of partial
      sums of at most sum |x|, carried through the norms.
    """
    *branch_scales, norm_scale = inputs.norm_scales
    rows = [rank_sum(x) for x in inputs.partial_sums]
    errors = [np.zeros(row.shape) for row in rows]
    if not exact_sum:
        half_eps = float(ml_dtypes.finfo(case.dtype).eps) / 2
        sizes = [np.abs(x.astype(np.float64)).sum(0) for x in inputs.partial_sums]
        errors = [(len(x) - 1) * half_eps * size for x, size in zip(inputs.partial_sums, sizes)]
    row, error = rows[0], errors[0]
    if branch_scales:
        row = sum(norm_float64(case, *pair) for pair in zip(rows, branch_scales))
        error = sum(_norm_error(case, *each) for each in zip(rows, errors, branch_scales))
    slack = _norm_error(case, row, error, norm_scale)
    if inputs.residual is not None:
        slack = slack + FLOAT32_ERROR * np.abs(inputs.residual.astype(np.float64))
    if inputs.layer_scalar is not None:
        slack = slack * np.abs(inputs.layer_scalar.astype(np.float64).reshape(()))
    return _half_ulp(expected, inputs.dtype) + slack


def assert_matches(case: Case, inputs: Inputs, outputs, *, exact_sum: bool, norm=norm_float64):
    """All outputs against an oracle, NaN for NaN and infinity for infinity.

    A next norm is compared with the norm of the hidden that came out. hidden has been compared
    itself, and is rounded, so this leaves nothing but the rounding of the norm.
    """
    hidden, *normed = outputs
    assert len(normed) == case.next_norms
    with np.errstate(invalid="ignore"):
        expected = oracle(case, inputs, norm)
        allowed = hidden_bound(case, inputs, expected, exact_sum=exact_sum)
        _assert_close(case, "hidden", hidden, expected, allowed, inputs)
        for i, (out, scale) in enumerate(zip(normed, inputs.next_norm_scales)):
            expected = norm(case, hidden, scale)
            slack = _norm_error(case, hidden, np.zeros(hidden.shape), scale)
            allowed = _half_ulp(expected, inputs.dtype) + slack
            _assert_close(case, f"normed {i}", out, expected, allowed, inputs)


def _assert_close(case, name, out, expected, allowed, inputs: Inputs) -> None:
    assert out.dtype == inputs.dtype
    assert out.shape == (*case.leading, case.width)
    out = out.astype(np.float64)
    rounded = expected.astype(inputs.dtype).astype(np.float64)  # may overflow to inf
    same = (out == rounded) | (np.isnan(out) & np.isnan(rounded))
    wrong = ~(same | (np.abs(out - expected) <= allowed))
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(
            f"{case}: {int(wrong.sum())} of {math.prod(out.shape)} elements of {name} off; at "
            f"{at} got {out[at]!r}, expected {expected[at]!r} within {allowed[at]:.3g}"
        )
