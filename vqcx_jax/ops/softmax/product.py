"""The product of hidden states and rows of weights, which every full output layer begins with."""

import functools

import jax
import jax.numpy as jnp

_einsum = functools.partial(jnp.einsum, "...d,vd->...v")


@jax.custom_vjp
def product(h: jax.Array, weights: jax.Array) -> jax.Array:
    """weights[v] . h, accumulated in float32; its cotangent is cast to the operands' dtype.

    Without the cast a float32 cotangent meets bfloat16 operands, and XLA widens both products of
    the backward pass, two thirds of the work, to float32.

    Args:
        h: (..., D). weights: (V, D) of the same dtype.

    Returns:
        float32 (..., V).
    """
    return _einsum(h, weights, preferred_element_type=jnp.float32)


def _forward(h: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(h, weights), (h, weights)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    z, transpose = jax.vjp(_einsum, *residuals)
    return transpose(g.astype(z.dtype))


product.defvjp(_forward, _backward)
