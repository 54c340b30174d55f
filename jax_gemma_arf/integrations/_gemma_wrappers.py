"""The wrappers of ``gm.nn`` around a model: LoRA, Int4 and Int8 weights, quantization aware training.

A wrapper calls its model under an interceptor of Flax's methods, which replaces each Einsum module
that is called. The modules of a tensor parallel block have one rank's size. LoRA and IntWrapper are
right there, once their parameters are split along the same heads and hidden units as the weights
that they adapt or replace. Simulated quantization is not, because the scale of a channel depends on
the weights of all ranks: it is applied to the whole weights instead, in front of the blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.linen import module as flax_module
from gemma import peft
from gemma.gm.nn import _lora, _quantization

WRAPPERS = (_lora.LoRA, _quantization.IntWrapper, _quantization.QuantizationAwareWrapper)

Path = tuple[str, ...]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model in a wrapper, or the model itself if it is in none."""
    return model.model if isinstance(model, WRAPPERS) else model


def sharded_axes(of_weights: dict[Path, int]) -> dict[Path, int]:
    """Returns the axis of each parameter of a wrapper that is split over the ranks.

    LoRA replaces ``inputs,w->outputs`` by ``inputs,a,b->outputs``: a has the reduced axes of w, then
    the rank; b has the rank, then the other axes of w. The kernel and the scale of IntWrapper have
    the axes of w. An axis that the scale is constant along has size 1 there.

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
            "a tensor parallel model runs in one wrapper that replaces its modules, which must be "
            f"{', '.join(_WRAPPER_OF.values())}; got {' around '.join(names)}"
        )
    return bool(active)


def quantization_method() -> peft.QuantizationMethod | None:
    """Returns the method of an active QuantizationAwareWrapper, or None if there is none."""
    return _active().get(_SIMULATE, {}).get("method")


def simulate_quantization(params: Any, method: peft.QuantizationMethod, dtype: Any) -> Any:
    """Quantizes the weights of Gemma 2 and 3 blocks as QuantizationAwareWrapper does.

    Args:
      params: by the names of layers, whole, as they are in jit.
      method: from quantization_method.
      dtype: of the activations, in which the wrapper quantizes.
    """

    def quantize(path, w):
        if path[-1].key not in ("w", "gating_einsum", "linear"):
            return w
        return peft.simulate_quantize(w.astype(dtype), method)

    return jax.tree.map_with_path(quantize, params)


def without_interceptors(method, args, kwargs, context):
    """Calls a method without the interceptors that were registered before this one."""
    del method
    return context.orig_method(*args, **kwargs)


_SIMULATE = _quantization._replace_by_simulated_quantization
_WRAPPER_OF = {
    _lora._replace_by_lora: "gm.nn.LoRA",
    _quantization._replace_by_int: "gm.nn.IntWrapper",
    _SIMULATE: "gm.nn.QuantizationAwareWrapper",
}


def _active() -> dict[Callable[..., Any], dict[str, Any]]:
    """Returns the functions by which active interceptors replace modules, with their options."""
    # Flax has no public name for it; tests/test_gemma_wrappers.py fails if it is gone.
    interceptors = getattr(flax_module, "_global_interceptor_stack", ())
    owners = (getattr(interceptor, "__self__", None) for interceptor in interceptors)
    functions = (
        owner.replace_module_fn for owner in owners if isinstance(owner, peft.ModuleInterceptor)
    )
    return {getattr(f, "func", f): getattr(f, "keywords", {}) for f in functions}


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
