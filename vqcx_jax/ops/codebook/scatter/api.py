"""V logits of any number of codebooks, by the implementation that suits the device."""

import functools

import jax
from jax.typing import DTypeLike

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.checks import check_per_token
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.codebook.scatter import tpu, xla


def logits(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    dtype: DTypeLike = "float32",
    implementation: str | None = None,
    product_dtype: DTypeLike = "float32",
) -> jax.Array:
    """Z_v = cap(scale[v] sum_m code_logits[m][assignment[v, m]]) + bias[v].

    Args:
        code_logits: M arrays, float32 (..., K_m). assignment: int (V, M), column m in [0, K_m).
        bias, scale: (V,) or None.
        soft_cap: of the sums, see `ops.soft_cap`; None: as they are.
        dtype: of the result; what comes before is float32.
        implementation: "xla", "pallas_tpu", or None: the kernel where there is one.
        product_dtype: as in `streaming.log_z`.

    Returns:
        (..., V) in `dtype`. A NaN in code logits may spread over all V logits of its position.

    Raises:
        UserError: assignment is not (V, M); bias or scale is not (V,); the implementation that
            was named cannot run.
    """
    multi.check_assignment(code_logits, assignment)
    check_per_token("bias", bias, assignment.shape[0])
    check_per_token("scale", scale, assignment.shape[0])
    arrays = (code_logits, assignment, bias, scale)
    implementations = {
        dispatch.XLA: functools.partial(xla.logits, *arrays, soft_cap=soft_cap, dtype=dtype),
        dispatch.PALLAS_TPU: functools.partial(
            tpu.logits, *arrays, soft_cap=soft_cap, dtype=dtype, product_dtype=product_dtype
        ),
    }
    return dispatch.run("codebook.scatter.logits", implementations, implementation)
