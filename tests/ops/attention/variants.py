"""Every encoding of positions with its definition and parameters, for tests of all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings

from vqcx_jax.ops import attention as ops

# Examples are the same in every run; the database of failures is not needed then.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=15)

NUM_HARMONICS = 3


class Variant(NamedTuple):
    """encode(q, k, cos, sin, *parameters) and the scores that its dot products must be."""

    encode: Callable[..., tuple[jax.Array, jax.Array]]
    scores: Callable[..., Any]
    parameters: Callable[[Any, int, int, int], tuple[Any, ...]]  # Of (normal, H, K, d).
    frequencies: Callable[[int], jax.Array] = ops.rope_frequencies


VARIANTS = {
    "rope": Variant(ops.rope_queries_and_keys, ops.rope_scores, lambda normal, H, K, d: ()),
    "published": Variant(
        ops.complex_queries_and_keys,
        ops.complex_scores,
        lambda normal, H, K, d: (normal((K, d // 2)), normal((H, d // 2))),
    ),
    "smooth": Variant(
        ops.smooth_queries_and_keys,
        ops.smooth_scores,
        lambda normal, H, K, d: (0.7 * normal((K, d)), normal((H, d // 2))),
    ),
    "harmonics": Variant(
        ops.harmonic_queries_and_keys,
        ops.harmonic_scores,
        lambda normal, H, K, d: tuple(normal((2, H, NUM_HARMONICS, d // 2))),
    ),
    "amplitude": Variant(
        ops.amplitude_queries_and_keys,
        lambda q, k, bias, *others: ops.harmonic_scores(
            q, k, jnp.ones_like(bias)[:, None], bias[:, None], *others
        ),
        lambda normal, H, K, d: (normal((H, d // 2)),),
    ),
    "pope": Variant(
        ops.pope_queries_and_keys,
        ops.pope_scores,
        lambda normal, H, K, d: (np.clip(normal((H, d)) - 3.0, -6.0, -0.1),),
        ops.pope_frequencies,
    ),
}


def make_inputs(
    name: str, num_heads: int, num_kv_heads: int, head_dim: int, length: int, dtype: Any = None
) -> tuple[jax.Array, ...]:
    """q and k for two rows, in dtype (float32), and the float32 parameters."""
    normal = np.random.default_rng(0).standard_normal
    q, k = normal((2, length, num_heads, head_dim)), normal((2, length, num_kv_heads, head_dim))
    parameters = VARIANTS[name].parameters(normal, num_heads, num_kv_heads, head_dim)
    return (
        jnp.asarray(q, dtype or jnp.float32),
        jnp.asarray(k, dtype or jnp.float32),
        *(jnp.asarray(p, jnp.float32) for p in parameters),
    )


def table(name: str, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    return ops.rotary_table(positions, VARIANTS[name].frequencies(head_dim))


def dot_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """(B, H, T, S): what an attention makes of queries and keys."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)


def fast_scores(name: str, q: Any, k: Any, parameters: Any, cos: Any, sin: Any) -> jax.Array:
    return dot_scores(*VARIANTS[name].encode(q, k, cos, sin, *parameters))


def definition(
    name: str, q: Any, k: Any, parameters: Any, frequencies: Any, *positions: Any
) -> Any:
    """The oracle, with what belongs to a key head repeated for its group of query heads."""
    num_heads = q.shape[2]

    def repeated(x: Any, axis: int) -> Any:
        return jnp.repeat(x, num_heads // x.shape[axis], axis=axis)

    if frequencies.ndim == 2:
        frequencies = repeated(frequencies, 0)
    parameters = [repeated(x, 0) for x in parameters]
    return VARIANTS[name].scores(q, repeated(k, 2), *parameters, frequencies, *positions)
