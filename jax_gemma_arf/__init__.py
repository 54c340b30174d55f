"""One kernel launch for the end of each half of a tensor-parallel Gemma block."""

from jax_gemma_arf import _newest_jax
from jax_gemma_arf._version import __version__ as __version__
from jax_gemma_arf.audit import audit as audit
from jax_gemma_arf.extension import set_peer_timeout as set_peer_timeout
from jax_gemma_arf.extension import workspaces as workspaces
from jax_gemma_arf.fused_ops import fused_all_reduce_norm as fused_all_reduce_norm
from jax_gemma_arf.fused_ops import fused_moe_tail as fused_moe_tail
from jax_gemma_arf.fused_ops import fused_post_ff as fused_post_ff
from jax_gemma_arf.fused_ops import fused_sandwich as fused_sandwich
from jax_gemma_arf.lowering import DISABLED_EXPORT_CHECKS as DISABLED_EXPORT_CHECKS
from jax_gemma_arf.lowering import SAVED_SUMS as SAVED_SUMS
from jax_gemma_arf.memory import reserve as reserve
from jax_gemma_arf.memory import workspace_bytes as workspace_bytes
from jax_gemma_arf.processes import initialize as initialize
from jax_gemma_arf.reference import reference_post_ff as reference_post_ff
from jax_gemma_arf.row_parallel import Projection as Projection
from jax_gemma_arf.row_parallel import down_proj_post_ff as down_proj_post_ff
from jax_gemma_arf.row_parallel import row_parallel_moe_tail as row_parallel_moe_tail
from jax_gemma_arf.row_parallel import row_parallel_post_ff as row_parallel_post_ff
from jax_gemma_arf.support import Support as Support
from jax_gemma_arf.support import fusion_support as fusion_support

_newest_jax.warn_if_newer()
