"""The loss within classes, by the implementation that suits the device."""

import functools

import jax
from jax.typing import DTypeLike

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights
from vqcx_jax.ops.codebook.members import tpu, xla


def nll(
    h: jax.Array,
    weights: Weights,
    classes: Classes,
    class_: jax.Array,
    rank: jax.Array,
    *,
    implementation: str | None = None,
    product_dtype: DTypeLike = "float32",
) -> jax.Array:
    """-log p(member `rank` of a class | class, h).

    Args:
        h: (..., D).
        class_: int (...), in [0, C); negative: no class, the result is 0.
        rank: int (...), in [0, R), of a member that there is.
        implementation: "xla", "pallas_tpu", or None: the kernel where there is one.
        product_dtype: as in `streaming.log_z`.

    Returns:
        float32 (...).

    Raises:
        UserError: the implementation that was named cannot run.
    """
    arrays = (h, weights, classes, class_, rank)
    implementations = {
        dispatch.XLA: functools.partial(xla.nll, *arrays),
        dispatch.PALLAS_TPU: functools.partial(tpu.nll, *arrays, product_dtype=product_dtype),
    }
    return dispatch.run("codebook.members.nll", implementations, implementation)
