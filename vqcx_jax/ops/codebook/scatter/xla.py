"""The formula, in plain JAX: gathers whose transposes are scatters by code."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vqcx_jax.ops import soft_cap as cap
from vqcx_jax.ops.codebook import multi


def logits(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    dtype: DTypeLike = "float32",
) -> jax.Array:
    """See `api.logits`."""
    z = cap.soft_cap(multi.logits(code_logits, assignment, None, scale), soft_cap)
    return (z if bias is None else z + bias.astype(jnp.float32)).astype(dtype)
