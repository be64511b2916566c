"""`encode.complex_queries_and_keys` by the implementation that suits the device."""

import functools

import jax

from vqcx_jax.ops import attention, dispatch
from vqcx_jax.ops.euler_turn import mosaic_gpu


def queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Q' and k' of complex attention; see `encode.complex_queries_and_keys` for the arguments.

    Args:
        implementation: "xla", "mosaic_gpu" (Hopper GPUs), or None: the kernel where it can run.

    Raises:
        UserError: the implementation that was named cannot run.
    """
    args = (q, k, cos, sin, delta, bias)
    implementations = {
        dispatch.XLA: functools.partial(attention.complex_queries_and_keys, *args),
        dispatch.MOSAIC_GPU: functools.partial(mosaic_gpu.queries_and_keys, *args),
    }
    return dispatch.run("euler_turn.queries_and_keys", implementations, implementation)
