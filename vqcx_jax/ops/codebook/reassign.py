"""Token maps that follow training: tokens go to the codes whose tokens have like hidden states.

From equal vectors, the first step of gradient descent for a token's own vector would be along the
mean of the hidden states at which the token is the target, less the mean of all of them
(d loss / d w_v = sum_n (p_nv - y_nv) h_n). Tokens with near centred means want near vectors, and so
should share codes. The means are known from running sums; `reassign` is a step of Lloyd's algorithm
on them that knows codes by their tokens, so that code vectors go on being trained as they are.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

# Sums of code vectors are fitted by so many rounds of least squares, one codebook at a time.
_ROUNDS = 10
_TINY = 1e-30


class Statistics(NamedTuple):
    """Sums over positions, by target.

    Attributes:
        sums: float32 (V, D), of hidden states.
        counts: float32 (V,), of positions.
    """

    sums: jax.Array
    counts: jax.Array


def observe(h: jax.Array, targets: jax.Array, is_token: jax.Array, vocab_size: int) -> Statistics:
    """The statistics of one batch.

    Args:
        h: (..., D), of any float type. targets: int (...); those outside [0, V) do not count.
        is_token: bool (...), which positions count.
        vocab_size: V.
    """
    targets_N = jnp.where(is_token, targets, vocab_size).reshape(-1)  # V is dropped.
    h_NxD = jax.lax.stop_gradient(h).astype(jnp.float32).reshape(-1, h.shape[-1])
    ones_N = jnp.ones(targets_N.shape, jnp.float32)
    return Statistics(
        jax.ops.segment_sum(h_NxD, targets_N, vocab_size),
        jax.ops.segment_sum(ones_N, targets_N, vocab_size),
    )


def update(statistics: Statistics, observed: Statistics, decay: float) -> Statistics:
    """The exponentially weighted sums after one more step, of which `observed` is all."""
    return jax.tree.map(lambda old, new: decay * old + new, statistics, observed)


def reassign(
    statistics: Statistics,
    assignment: jax.Array,
    num_codes: int,
    form: Literal["additive", "product"],
    *,
    min_count: float,
    directions: bool = False,
    is_fixed: jax.Array | None = None,
) -> jax.Array:
    """Moves each token to the nearest mean of codes, in every codebook.

    Tokens that were seen less than `min_count` times keep their codes; codes whose tokens were,
    all together, take no others. A token moves only to what is nearer than where it is.

    Args:
        assignment: int (V, M), values in [0, K).
        num_codes: K.
        form: "product": codebook m has the m-th slice of the means. "additive": codebooks have,
            one after the other, what is left of the means by the others.
        min_count: above 0.
        directions: of the means only directions matter, because tokens have scales.
        is_fixed: bool (V,), tokens that neither move nor count; None: none.

    Returns:
        int32 (V, M).
    """
    assignment_VxM = assignment.astype(jnp.int32)
    means_VxD = _centred_means(statistics)
    if directions:
        norms_V = jnp.linalg.norm(means_VxD, axis=-1)
        means_VxD = means_VxD / jnp.maximum(norms_V, _TINY)[:, None]
    weights_V = statistics.counts
    if is_fixed is not None:
        weights_V = jnp.where(is_fixed, 0.0, weights_V)
    of_form = _reassign_slices if form == "product" else _reassign_sums
    return of_form(means_VxD, weights_V, assignment_VxM, num_codes, min_count)


def _centred_means(statistics: Statistics) -> jax.Array:
    """(V, D); without meaning for tokens with a count of 0."""
    sums_VxD, counts_V = statistics
    mean_D = jnp.sum(sums_VxD, axis=0) / jnp.maximum(jnp.sum(counts_V), _TINY)
    return sums_VxD / jnp.maximum(counts_V, _TINY)[:, None] - mean_D


def _reassign_slices(
    x_VxD: jax.Array, weights_V: jax.Array, codes_VxM: jax.Array, num_codes: int, min_count: float
) -> jax.Array:
    vocab_size, num_codebooks = codes_VxM.shape
    x_MxVxW = x_VxD.reshape(vocab_size, num_codebooks, -1).swapaxes(0, 1)

    def one_codebook(slice_and_codes: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_VxW, codes_V = slice_and_codes
        y_KxW, weights_K = _code_means(x_VxW, weights_V, codes_V, num_codes)
        nearest_V = _nearest(x_VxW, codes_V, y_KxW, weights_K >= min_count)
        return jnp.where(weights_V >= min_count, nearest_V, codes_V)

    # Not all codebooks at once: each needs V x K distances.
    return jax.lax.map(one_codebook, (x_MxVxW, codes_VxM.T)).T


class _Sums(NamedTuple):
    """Code vectors whose sums are the means but for the rest."""

    y_MxKxD: jax.Array
    codes_MxV: jax.Array
    rest_VxD: jax.Array


def _reassign_sums(
    x_VxD: jax.Array, weights_V: jax.Array, codes_VxM: jax.Array, num_codes: int, min_count: float
) -> jax.Array:
    num_codebooks = codes_VxM.shape[1]
    is_seen_V = weights_V >= min_count

    def step(i: jax.Array, state: _Sums, *, moves: bool) -> _Sums:
        y_MxKxD, codes_MxV, rest_VxD = state
        m = i % num_codebooks
        codes_V = codes_MxV[m]
        left_VxD = rest_VxD + y_MxKxD[m, codes_V]
        y_KxD, weights_K = _code_means(left_VxD, weights_V, codes_V, num_codes)
        if moves:
            nearest_V = _nearest(left_VxD, codes_V, y_KxD, weights_K >= min_count)
            codes_V = jnp.where(is_seen_V, nearest_V, codes_V)
        rest_VxD = left_VxD - y_KxD[codes_V]
        return _Sums(y_MxKxD.at[m].set(y_KxD), codes_MxV.at[m].set(codes_V), rest_VxD)

    y_MxKxD = jnp.zeros((num_codebooks, num_codes, x_VxD.shape[1]), jnp.float32)
    state = _Sums(y_MxKxD, codes_VxM.T, x_VxD)
    rounds = _ROUNDS * num_codebooks
    state = jax.lax.fori_loop(0, rounds, functools.partial(step, moves=False), state)
    state = jax.lax.fori_loop(0, num_codebooks, functools.partial(step, moves=True), state)
    return state.codes_MxV.T


def _code_means(
    x_VxW: jax.Array, weights_V: jax.Array, codes_V: jax.Array, num_codes: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted means of the tokens of each code (K, W), 0 without any, and their weights (K,)."""
    # A product and not a scatter, whose sums would be in any order on a GPU.
    weights_VxK = weights_V[:, None] * (codes_V[:, None] == jnp.arange(num_codes))
    weights_K = jnp.sum(weights_VxK, axis=0)
    sums_KxW = jnp.matmul(weights_VxK.T, x_VxW, precision="highest")
    return sums_KxW / jnp.maximum(weights_K, _TINY)[:, None], weights_K


def _nearest(
    x_VxW: jax.Array, codes_V: jax.Array, y_KxW: jax.Array, is_open_K: jax.Array
) -> jax.Array:
    """The nearest open code of every token, int32 (V,): its own, if none is nearer."""
    products_VxK = jnp.matmul(x_VxW, y_KxW.T, precision="highest")
    # Squared distances, less what all codes have in common.
    distances_VxK = jnp.sum(y_KxW**2, axis=-1) - 2 * products_VxK
    current_V = jnp.take_along_axis(distances_VxK, codes_V[:, None], axis=1)[:, 0]
    distances_VxK = jnp.where(is_open_K, distances_VxK, jnp.inf)
    nearest_V = jnp.argmin(distances_VxK, axis=1).astype(jnp.int32)
    return jnp.where(jnp.min(distances_VxK, axis=1) < current_V, nearest_V, codes_V)
