"""Product codes in classes to be tested with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.ops.codebook import classes

V, C, M, K, D = 103, 9, 3, 5, 6


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def make_weights(
    rng: np.random.Generator,
    tokens: classes.Classes,
    shape: tuple[int, int, int],
    bias: bool,
    scale: bool,
) -> classes.Weights:
    """Args: shape: M, K, D / M."""
    num_nodes = len(tokens.entry_of) + len(tokens.members)
    num_codebooks, num_codes, _ = shape
    codes = jnp.asarray(rng.integers(num_codes, size=(num_nodes, num_codebooks)), jnp.int32)
    return classes.Weights(
        normal(rng, *shape),
        classes.arrange_codes(codes, tokens, num_codes),
        normal(rng, num_nodes) if scale else None,
        normal(rng, num_nodes) if bias else None,
    )


def class_of() -> np.ndarray:
    """Class 8 has one token; ten tokens are frequent."""
    rng = np.random.default_rng(0)
    found = np.append(np.arange(8), rng.integers(8, size=V - 8)).astype(np.int32)
    found[rng.choice(np.arange(8, V), 10, replace=False)] = -1
    found[50] = 8
    return found


CLASSES = classes.arrange(class_of(), C)


def make(dtype: Any, bias: bool = True, scale: bool = True) -> tuple[Any, ...]:
    """Hidden states, weights and targets."""
    rng = np.random.default_rng(1)
    weights = make_weights(rng, CLASSES, (M, K, D // M), bias, scale)
    weights = weights._replace(codebooks=weights.codebooks.astype(dtype))
    targets = jnp.asarray(rng.permutation(5 * 23) % V).reshape(5, 23)
    return normal(rng, 5, 23, D).astype(dtype), weights, targets
