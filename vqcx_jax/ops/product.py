"""The product of hidden states and rows of weights, which every output layer begins with."""

import functools

import jax
import jax.numpy as jnp

from vqcx_jax.ops.checks import check_width


def product(h: jax.Array, weights: jax.Array, subscripts: str = "...d,vd->...v") -> jax.Array:
    """weights[v] . h, accumulated in float32; its cotangent is cast to the operands' dtype.

    Without the cast a float32 cotangent meets bfloat16 operands, and XLA widens both products of
    the backward pass, two thirds of the work, to float32.

    Args:
        h: (..., D). weights: (V, D) of the same dtype.
        subscripts: of `jnp.einsum`, for arrays of other shapes.

    Returns:
        float32 (..., V).

    Raises:
        UserError: rows are not as wide as h.
    """
    check_width(h, weights)
    return _product(subscripts, h, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, h: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, h, weights, preferred_element_type=jnp.float32)


def _forward(
    subscripts: str, h: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(subscripts, h, weights), (h, weights)


def _backward(
    subscripts: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    z, transpose = jax.vjp(functools.partial(jnp.einsum, subscripts), *residuals)
    return transpose(g.astype(z.dtype))


_product.defvjp(_forward, _backward)
