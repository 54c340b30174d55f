"""The wrappers of ``gm.nn`` that run around a tensor parallel model: LoRA, Int4 and Int8 weights.

A wrapper calls its model under an interceptor of Flax's methods, which replaces each Einsum module
that is called. In tensor parallel blocks these have the size of one rank. That is right for LoRA
and IntWrapper, if their parameters are split along the same heads and hidden units as the weights
that they adapt or replace. It is not for QuantizationAwareWrapper: the scale of a channel depends
on the weights of all ranks.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen import module as flax_module
from gemma import peft
from gemma.gm.nn import _lora, _quantization

WRAPPERS = (_lora.LoRA, _quantization.IntWrapper)

Path = tuple[str, ...]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model in a wrapper, or the model itself if it is in none."""
    return model.model if isinstance(model, WRAPPERS) else model


def sharded_axes(of_weights: dict[Path, int]) -> dict[Path, int]:
    """Returns the axis of each parameter of a wrapper that is split over the ranks.

    LoRA adds ``inputs,a,b->outputs`` to ``inputs,w->outputs``: a has the reduced axes of w, then
    the rank of the adapter; b has that rank, then the other axes of w. The kernel and the scale of
    IntWrapper have the axes of w. An axis that the scale is constant along has size 1 there.

    Args:
      of_weights: the same for the weights, by their paths in a block.
    """
    axes = {}
    for (*owner, name), axis in of_weights.items():
        suffix = "0" if name == "w" else name
        axes |= {(*owner, f"_IntEinsum_{suffix}", leaf): axis for leaf in ("kernel", "scale")}
        lora = (*owner, f"_LoRAEinsum_{suffix}", "lora")
        if {"attn_vec_einsum", "linear"} & {owner[-1], name}:  # reduces heads or hidden units
            axes[*lora, "a"] = axis
        else:  # reduces D, which is behind the heads or hidden units
            axes[*lora, "b"] = axis + 1
    return axes


def check_active() -> bool:
    """Checks that the blocks can run under the interceptors that are active.

    Returns:
      Whether one of WRAPPERS is active.

    Raises:
      TypeError: if modules are replaced otherwise than by one of WRAPPERS, or by two of them.
    """
    active = _active()
    unknown = [function for function in active if function not in _WRAPPER_OF]
    if unknown or len(active) > 1:
        names = [_WRAPPER_OF.get(function, _name(function)) for function in active]
        raise TypeError(
            "a tensor parallel model runs in one wrapper that replaces its modules, "
            f"{' or '.join(_WRAPPER_OF.values())}, got {', '.join(names)}; simulate quantization "
            "on the parameters instead (docs/sharp_bits.md)"
        )
    return bool(active)


_WRAPPER_OF = {
    _lora._replace_by_lora: "gm.nn.LoRA",
    _quantization._replace_by_int: "gm.nn.IntWrapper",
}


def _active() -> list[Callable[..., Any]]:
    """Returns the functions by which the active interceptors replace modules."""
    # Flax has no public name for it; tests/test_gemma_wrappers.py fails if it is gone.
    interceptors = getattr(flax_module, "_global_interceptor_stack", ())
    owners = (getattr(interceptor, "__self__", None) for interceptor in interceptors)
    functions = [
        owner.replace_module_fn for owner in owners if isinstance(owner, peft.ModuleInterceptor)
    ]
    return [getattr(function, "func", function) for function in functions]


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
