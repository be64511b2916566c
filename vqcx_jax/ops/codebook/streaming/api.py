"""Log Z and the best tokens of any number of codebooks, by what suits the device."""

import functools

import jax
from jax.typing import DTypeLike

from vqcx_jax.ops import dispatch, sampling
from vqcx_jax.ops.checks import check_per_token
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.codebook.streaming import mosaic_gpu, tpu, xla


def log_z(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    implementation: str | None = None,
    product_dtype: DTypeLike = "float32",
) -> jax.Array:
    """logsumexp_v of z_v = scale[v] sum_m code_logits[m][assignment[v, m]] + bias[v].

    Args:
        code_logits: M arrays, float32 (..., K_m). assignment: int (V, M), column m in [0, K_m).
        bias, scale: (V,) or None.
        implementation: "xla", "pallas_tpu", "mosaic_gpu" (Hopper), or None: the kernel on TPUs.
        product_dtype: what a kernel may round code logits and probabilities to before it
            multiplies them on a matrix unit: float32 (not at all) or bfloat16. Sums are float32.

    Returns:
        float32 (...).

    Raises:
        UserError: assignment is not (V, M); bias or scale is not (V,); the implementation that
            was named cannot run.
    """
    multi.check_assignment(code_logits, assignment)
    check_per_token("bias", bias, assignment.shape[0])
    check_per_token("scale", scale, assignment.shape[0])
    arrays = (code_logits, assignment, bias, scale)
    implementations = {
        dispatch.XLA: functools.partial(xla.log_z, *arrays),
        dispatch.PALLAS_TPU: functools.partial(tpu.log_z, *arrays, product_dtype=product_dtype),
    }
    if implementation == dispatch.MOSAIC_GPU:  # By name alone: it has not been timed yet.
        implementations[dispatch.MOSAIC_GPU] = functools.partial(
            mosaic_gpu.log_z, *arrays, product_dtype=product_dtype
        )
    return dispatch.run("codebook.streaming.log_z", implementations, implementation)


def top_k(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    k: int,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k largest of the logits z_v of `log_z`, their tokens, and log Z, in one pass.

    Equal logits: the lowest token first, as in `jax.lax.top_k`.

    Args:
        k: in 1 .. V.
        implementation: "xla", "pallas_tpu", or None: the kernel on TPUs. Others as in `log_z`.

    Returns:
        logits: float32 (..., k), from large to small. tokens: int32 (..., k). log_z: float32 (...).

    Raises:
        UserError: as `log_z`; k is not in 1 .. V.
    """
    multi.check_assignment(code_logits, assignment)
    check_per_token("bias", bias, assignment.shape[0])
    check_per_token("scale", scale, assignment.shape[0])
    sampling.check_k(k, assignment.shape[0])
    arrays = (code_logits, assignment, k, bias, scale)
    implementations = {
        dispatch.XLA: functools.partial(xla.top_k, *arrays),
        dispatch.PALLAS_TPU: functools.partial(tpu.top_k, *arrays),
    }
    return dispatch.run("codebook.streaming.top_k", implementations, implementation)
