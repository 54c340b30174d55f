"""One kernel launch for the end of each half of a tensor-parallel Gemma block."""

from jax_gemma_arf._src import newest_jax as _newest_jax
from jax_gemma_arf._src.audit import audit
from jax_gemma_arf._src.decision import FallbackCode, Objection, Support, fusion_support
from jax_gemma_arf._src.extension import Workspace, set_peer_timeout, workspaces
from jax_gemma_arf._src.fused_ops import (
    fused_all_reduce_norm,
    fused_moe_tail,
    fused_post_ff,
    fused_sandwich,
)
from jax_gemma_arf._src.lowering import DISABLED_EXPORT_CHECKS, SAVED_SUMS, TARGET_NAME
from jax_gemma_arf._src.memory import reserve, workspace_bytes
from jax_gemma_arf._src.processes import initialize
from jax_gemma_arf._src.reference import reference_post_ff, rmsnorm
from jax_gemma_arf._src.row_parallel import (
    Projection,
    down_proj_post_ff,
    row_parallel_moe_tail,
    row_parallel_post_ff,
)
from jax_gemma_arf._version import __version__

__all__ = [
    "DISABLED_EXPORT_CHECKS",
    "SAVED_SUMS",
    "TARGET_NAME",
    "FallbackCode",
    "Objection",
    "Projection",
    "Support",
    "Workspace",
    "__version__",
    "audit",
    "down_proj_post_ff",
    "fused_all_reduce_norm",
    "fused_moe_tail",
    "fused_post_ff",
    "fused_sandwich",
    "fusion_support",
    "initialize",
    "reference_post_ff",
    "reserve",
    "rmsnorm",
    "row_parallel_moe_tail",
    "row_parallel_post_ff",
    "set_peer_timeout",
    "workspace_bytes",
    "workspaces",
]

# Errors, pickles and help texts name the public place.
for _public in [globals()[_name] for _name in __all__]:
    if callable(_public):
        _public.__module__ = __name__

_newest_jax.warn_if_newer()
