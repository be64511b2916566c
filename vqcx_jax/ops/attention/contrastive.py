"""EulerFormer's auxiliary loss: phases of a layer's queries or keys, told apart from one another.

It wants phases to be spread out (Tian et al. 2024). A row is all planes of all heads at one
position; two copies of it, each with other planes dropped, should be more alike than copies of
different rows. Alike means the cosine of phase differences, averaged over the planes: it has no
branch cut, and needs no angle.

For row n of N, with unit phases u_i = e^{i theta_i}, dropout masks m, m' in {0, 1} per plane and

    sim(n, j) = sum_i m_n,i m'_j,i cos(theta_n,i - theta_j,i) / sqrt(sum_i m_n,i sum_i m'_j,i),

the loss is the mean over n of -log( exp(sim(n, n) / tau) / sum_j exp(sim(n, j) / tau) ).

The published code compares intact phases with one copy. Its dropout is of angles: those dropped
become 0, and the others are multiplied by 1 / (1 - rate) = 2. Planes have learned weights there,
similarities are not normalised, and phases are those after the rotation by positions.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops.attention.planes import smooth_amplitude, to_pair


def phase_contrastive_loss(
    x: jax.Array,
    key: jax.Array,
    *,
    drop_rate: float,
    temperature: float,
    valid: jax.Array | None = None,
) -> jax.Array:
    """InfoNCE between two dropped-out copies of the phases of x.

    Args:
        x: (B, N, H, d) queries or keys; plane i is (x[i], x[i + d/2]). Rows are told apart from
            the N of their own batch entry: as it comes from a layer, position by position within a
            sequence. (B, T, H, d) reshaped to (1, B T, H, d) compares across the batch, to
            (1, B, T H, d) whole sequences.
        key: of `jax.random`.
        drop_rate: share of the planes that each copy loses, in [0, 1).
        temperature: tau.
        valid: bool (B, N), False for rows to leave out (padding). None: all count.

    Returns:
        float32 scalar, the mean over valid rows; 0 without any. It holds a (B, N, N) array.
        Gradients are finite everywhere; planes much smaller than `planes.EPSILON` have no phase
        and count for less.

    Raises:
        UserError: drop_rate is not in [0, 1), or temperature is not positive.
    """
    if not 0 <= drop_rate < 1:
        raise UserError(f"drop_rate={drop_rate}: must be at least 0 and below 1")
    if not temperature > 0:
        raise UserError(f"temperature={temperature}: must be positive")
    first, second = (_dropped_phases(x, half, drop_rate) for half in jax.random.split(key))
    similarity = jnp.einsum("bnf,bjf->bnj", first, second) / temperature
    if valid is None:
        valid = jnp.ones(x.shape[:2], bool)
    own = jnp.diagonal(similarity, axis1=-2, axis2=-1)
    # Not -inf, of which a batch entry without valid rows would make NaN.
    others = jnp.where(valid[:, None, :], similarity, jnp.finfo(jnp.float32).min)
    losses = jnp.where(valid, jax.nn.logsumexp(others, axis=-1) - own, 0.0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(valid), 1)


def _dropped_phases(x: jax.Array, key: jax.Array, drop_rate: float) -> jax.Array:
    """[cos theta, sin theta] of the planes that are kept, of unit norm: (B, N, H d)."""
    pair = to_pair(x)
    kept = jax.random.bernoulli(key, 1.0 - drop_rate, pair[0].shape) / smooth_amplitude(pair)
    flat = jnp.stack([part * kept for part in pair], axis=-1).reshape(*x.shape[:2], -1)
    # Of all but empty rows the squared norm is the number of planes kept: nothing is near 1e-6.
    return flat * jax.lax.rsqrt(jnp.sum(flat**2, axis=-1, keepdims=True) + 1e-6)
