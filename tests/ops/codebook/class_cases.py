"""Product codes in classes to be tested with."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vqcx_jax.ops.codebook import classes

V, C, M, K, D = 103, 9, 3, 5, 6


def class_of() -> np.ndarray:
    """Class 8 has one token; ten tokens are frequent."""
    rng = np.random.default_rng(0)
    found = np.append(np.arange(8), rng.integers(8, size=V - 8)).astype(np.int32)
    found[rng.choice(np.arange(8, V), 10, replace=False)] = -1
    found[50] = 8
    return found


CLASSES = classes.arrange(class_of(), C)


def make(dtype: Any, bias: bool = True, scale: bool = True) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    codes = jnp.asarray(rng.integers(K, size=(V + C, M)), jnp.int32)
    weights = classes.Weights(
        normal(M, K, D // M).astype(dtype),
        classes.arrange_codes(codes, CLASSES, K),
        normal(V + C) if scale else None,
        normal(V + C) if bias else None,
    )
    h = normal(5, 23, D).astype(dtype)
    targets = jnp.asarray(rng.permutation(5 * 23) % V).reshape(5, 23)
    return h, weights, targets
