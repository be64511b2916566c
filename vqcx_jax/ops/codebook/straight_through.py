"""Codes that are learned: a choice among a few near codes per token, by straight-through Gumbel.

Each token has, in each codebook, C candidate codes and a score for each. Forward, the code with the
highest score, plus Gumbel noise while training, is taken (so that codes are drawn from the softmax
of the scores); backward, the gradient is that of the mixture that softmax gives (Jang et al. 2017,
Maddison et al. 2017; straight-through: Bengio et al. 2013).
"""

import jax
import jax.numpy as jnp


def nearest_codes(codebooks: jax.Array, num_candidates: int) -> jax.Array:
    """The nearest codes of every code within its codebook, itself first.

    Args:
        codebooks: (M, K, D_m). num_candidates: C, at most K.

    Returns:
        int32 (M, K, C).
    """
    squares = jnp.sum(codebooks**2, axis=-1)
    products = jnp.einsum("mkd,mld->mkl", codebooks, codebooks)
    distances = squares[:, :, None] + squares[:, None, :] - 2 * products
    itself = jnp.eye(codebooks.shape[1], dtype=bool)
    return jax.lax.top_k(-jnp.where(itself, -jnp.inf, distances), num_candidates)[1]


def choice(scores: jax.Array, key: jax.Array | None) -> jax.Array:
    """One-hot choices whose gradient is the softmax's.

    Args:
        scores: float32 (..., C).
        key: draws from softmax(scores); None: the highest score, the first of equals.

    Returns:
        float32 (..., C), a one at the choice.
    """
    if key is not None:
        scores = scores + jax.random.gumbel(key, scores.shape)
    soft = jax.nn.softmax(scores, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
    return soft + jax.lax.stop_gradient(hard - soft)


def code_vectors(
    codes: jax.Array, candidates_VxC: jax.Array, scores_VxC: jax.Array, key: jax.Array | None
) -> jax.Array:
    """The chosen code vector of every token in one codebook.

    Args:
        codes: (K, D_m). candidates_VxC: int, values in [0, K). scores_VxC: float32.
        key: as in `choice`.

    Returns:
        (V, D_m).
    """
    choice_VxC = choice(scores_VxC, key).astype(codes.dtype)
    return jnp.einsum("vc,vcd->vd", choice_VxC, codes[candidates_VxC])


def chosen(candidates: jax.Array, scores: jax.Array) -> jax.Array:
    """The codes of the highest scores: int (...), of candidates int (..., C) and scores."""
    best = jnp.argmax(scores, axis=-1)
    return jnp.take_along_axis(candidates, best[..., None], axis=-1)[..., 0]


def noise_key(tokens: jax.Array, scores: jax.Array) -> jax.Array:
    """A PRNG key that is another one for other tokens and for other scores.

    It is the same on every mesh: sums of integers do not depend on their order, as those of
    hidden states do.

    Args:
        tokens: int (...). scores: float32 (...).

    Returns:
        a typed PRNG key.
    """
    place = jnp.arange(tokens.size, dtype=jnp.uint32).reshape(tokens.shape)
    of_tokens = jnp.sum((tokens.astype(jnp.uint32) + 1) * (2 * place + 1), dtype=jnp.uint32)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(scores), jnp.uint32)
    key = jax.random.fold_in(jax.random.key(0), of_tokens)
    return jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32))
