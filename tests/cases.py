"""Shared cases, oracles and tolerance, for every implementation of every tail.

Two oracles that share no code with the library: NumPy in float64, and Flax's RMSNorm. The tolerance
is derived from the numerics contract (see `bound`), not tuned.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)

GEMMA_HIDDEN = (640, 1152, 1536, 2560, 2816, 3840, 5376)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: shapes, dtypes and options. `special` plants values into x, see `make_inputs`."""

    leading: tuple[int, ...] = (3,)
    hidden: int = 640
    dtype: np.dtype = BF16
    residual_dtype: np.dtype | None = None
    scale_dtype: np.dtype | None = None
    layer_scalar: tuple[int, ...] | None = ()
    eps: float = 1e-6
    scale_offset: float = 0.0
    special: str = ""
    seed: int = 0

    def __str__(self) -> str:
        parts = ["x".join(map(str, (*self.leading, self.hidden))), self.dtype.name]
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


@dataclasses.dataclass(frozen=True)
class Inputs:
    x: np.ndarray  # [N, *leading, D], one slice a rank
    residual: np.ndarray
    norm_scale: np.ndarray
    layer_scalar: np.ndarray | None

    def operands(self) -> list[np.ndarray]:
        scalar = [] if self.layer_scalar is None else [self.layer_scalar]
        return [self.x, self.residual, self.norm_scale, *scalar]


CASES = [
    # Gemma's widths, decode and small prefill, odd counts (hazards 1 and 5).
    *(Case((tokens,), hidden) for hidden in (640, 2816, 5376) for tokens in (1, 7, 66)),
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
    # Values that protocols stumble over: -0.0 marks an empty Lamport slot (hazard 31).
    *(
        Case((6,), 640, dtype, special=special)
        for dtype in (BF16, F16, F32)
        for special in ("nan", "inf", "negative_zero", "denormal", "large", "zero")
    ),
]


def make_inputs(case: Case, ranks: int) -> Inputs:
    """Random operands. Residual and normed row are of one size, so that their order matters."""
    rng = np.random.default_rng([case.seed, ranks, case.hidden, *case.leading])
    shape = (*case.leading, case.hidden)
    x = rng.standard_normal((ranks, *shape))
    flat = x.reshape(ranks, -1, case.hidden)
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
    residual_dtype = case.residual_dtype or case.dtype
    scale_dtype = case.scale_dtype or case.dtype
    scalar = None
    if case.layer_scalar is not None:
        scalar = np.full(case.layer_scalar, 0.625 + 0.125 * rng.random(), scale_dtype)
    return Inputs(
        x=x.astype(case.dtype),
        residual=rng.standard_normal(shape).astype(residual_dtype),
        norm_scale=(1 - case.scale_offset + 0.25 * rng.standard_normal(case.hidden)).astype(
            scale_dtype
        ),
        layer_scalar=scalar,
    )


def rank_sum(x: np.ndarray) -> np.ndarray:
    """Float32 sum in rank order, rounded once to x's dtype: point 1 of the contract."""
    total = np.zeros(x.shape[1:], np.float32)
    for part in x:
        total = total + part.astype(np.float32)
    return total.astype(x.dtype)


def _terms(case: Case, inputs: Inputs, summed: np.ndarray):
    """Normed and scaled row, residual, scalar, reciprocal RMS, in float64."""
    row = summed.astype(np.float64)
    inverse_rms = 1 / np.sqrt((row * row).mean(-1, keepdims=True) + case.eps)
    scale = case.scale_offset + inputs.norm_scale.astype(np.float64)
    scalar = 1.0 if inputs.layer_scalar is None else float(inputs.layer_scalar.reshape(()))
    return row * inverse_rms * scale, inputs.residual.astype(np.float64), scalar, inverse_rms, scale


def oracle_float64(case: Case, inputs: Inputs) -> np.ndarray:
    """The contract in NumPy float64, before the last rounding."""
    with np.errstate(invalid="ignore"):
        normed, residual, scalar, *_ = _terms(case, inputs, rank_sum(inputs.x))
        return (normed + residual) * scalar


def oracle_flax(case: Case, inputs: Inputs) -> np.ndarray:
    """The same from Flax's RMSNorm in float32."""
    with jax.default_device(jax.devices("cpu")[0]):
        scale = case.scale_offset + inputs.norm_scale.astype(np.float32)
        normed = nn.RMSNorm(epsilon=case.eps, dtype=jnp.float32).apply(
            {"params": {"scale": jnp.asarray(scale)}},
            jnp.asarray(rank_sum(inputs.x).astype(np.float32)),
        )
        out = np.asarray(normed) + inputs.residual.astype(np.float32)
    return out if inputs.layer_scalar is None else out * inputs.layer_scalar.astype(np.float32)


def mistaken_order(case: Case, inputs: Inputs) -> np.ndarray:
    """What a Llama-style fusion computes: add, THEN norm. Must never pass."""
    added = rank_sum(inputs.x).astype(np.float64) + inputs.residual.astype(np.float64)
    normed, _, scalar, *_ = _terms(case, inputs, added)
    return normed * scalar


def bound(case: Case, inputs: Inputs, expected: np.ndarray, *, exact_sum: bool) -> np.ndarray:
    """How far an output may be from the float64 oracle.

    - One unit in the last place of the output dtype: half of it is the final rounding, and a value
      next to a tie may go to the other side of it.
    - 16 float32 roundings (2^-24 each) of the terms before they cancel: the row sum, rsqrt, and
      three products and sums. This is all there is for float32 outputs.
    - Without an exact sum (psum in x.dtype over more than two ranks): N - 1 roundings of partial
      sums of at most sum |x|, carried through the norm, also by way of the mean.
    """
    out_dtype = inputs.residual.dtype
    info = ml_dtypes.finfo(out_dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(expected), float(info.smallest_normal))))
    ulp = float(info.eps) * 2.0**exponent
    normed, residual, scalar, inverse_rms, scale = _terms(case, inputs, rank_sum(inputs.x))
    slack = 16 * 2.0**-24 * (np.abs(normed) + np.abs(residual))
    if not exact_sum:
        half_ulp = float(ml_dtypes.finfo(case.dtype).eps) / 2
        size = np.abs(inputs.x.astype(np.float64)).sum(0)
        error = (len(inputs.x) - 1) * half_ulp * size
        mean_error = np.sqrt((error * error).mean(-1, keepdims=True)) * inverse_rms
        slack = slack + error * inverse_rms * np.abs(scale) + np.abs(normed) * mean_error
    return ulp + slack * abs(scalar)


def assert_matches(
    case: Case, inputs: Inputs, out: np.ndarray, expected: np.ndarray, *, exact_sum: bool
) -> None:
    """out against an oracle, NaN for NaN and infinity for infinity."""
    assert out.dtype == inputs.residual.dtype
    assert out.shape == inputs.residual.shape
    out = out.astype(np.float64)
    with np.errstate(invalid="ignore"):
        allowed = bound(case, inputs, expected, exact_sum=exact_sum)
        rounded = expected.astype(inputs.residual.dtype).astype(np.float64)  # may overflow to inf
        same = (out == rounded) | (np.isnan(out) & np.isnan(rounded))
        wrong = ~(same | (np.abs(out - expected) <= allowed))
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(
            f"{case}: {int(wrong.sum())} of {math.prod(out.shape)} elements off; at {at} got "
            f"{out[at]!r}, expected {expected[at]!r} within {allowed[at]:.3g}"
        )
