"""One id for each row of logits."""

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.errors import UserError
from vqcx_jax.ops.checks import are_known
from vqcx_jax.ops.sampling.draw import draw
from vqcx_jax.ops.sampling.nucleus import nucleus


def sample(
    logits: jax.Array,
    key: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Draws an id from softmax(logits / temperature), cut to its top k, then to its nucleus.

    Args:
        logits: float32 (..., V).
        key: a typed PRNG key. Rows are independent.
        temperature: 0: the most probable id (the lowest of equals), whatever the key.
        top_k: only the so many most probable ids, as in `top_k`. None, or V and more: all.
        top_p: only the `nucleus` of what top_k leaves. None or 1: all.

    Returns:
        int32 (...).

    Raises:
        UserError: top_k is not positive; where they are known, a temperature that is below 0 or
            not finite, or a top_p outside of (0, 1]. Under jit a temperature below 0 is as 0, and
            such a top_p as the nearest that is accepted.

    Example:
        sample(logits, jax.random.key(0), temperature=0.8, top_k=50, top_p=0.95)
    """
    check_temperature(temperature)
    check_top_p(top_p)
    if top_k is not None:
        listed, ids = _top_k(logits, min(top_k, logits.shape[-1]))
        return sample_listed(listed, ids, key, temperature=temperature, top_p=top_p)
    temperature = jnp.asarray(temperature, jnp.float32)
    # Relative to the maximum: a tiny temperature then gives 0 and -inf, and never inf - inf.
    relative = logits - jnp.max(logits, axis=-1, keepdims=True)
    tempered = relative / divisor(temperature)
    if top_p is not None:
        tempered = nucleus(tempered, top_p)
    drawn = draw(tempered, key)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def sample_listed(
    logits: jax.Array,
    ids: jax.Array,
    key: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """`sample` from a list of ids.

    Args:
        logits: float32 (..., k), from large to small. ids: int (..., k). Others as in `sample`.

    Returns:
        int32 (...).
    """
    index = sample(logits, key, temperature=temperature, top_p=top_p)
    return jnp.take_along_axis(ids, index[..., None], axis=-1)[..., 0].astype(jnp.int32)


def top_k(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and ids of the k most probable, in order; of equals, the lowest id first.

    Args:
        logits: float32 (..., V).

    Returns:
        log_probs: float32 (..., k). ids: int32 (..., k).

    Raises:
        UserError: k is not in 1 .. V.
    """
    listed, ids = _top_k(logits, k)
    return listed - jax.nn.logsumexp(logits, axis=-1, keepdims=True), ids


def first_of_sorted(z: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of z and their ids, in order; of equals, the lowest id first.

    Two selections and a sort of k: ten times faster than a sort of everything.

    Args:
        z: float32 (..., I). ids: int (..., I), below 2^24.

    Returns:
        float32 (..., k). int (..., k).
    """
    # A minimum, and not the last: XLA on CPUs makes a sort of a top_k that is sliced further.
    last = jnp.min(jax.lax.top_k(z, k)[0], axis=-1, keepdims=True)
    # Of those that share the last place the lowest ids; float32 counts to 2^24.
    rank = jnp.where(z > last, jnp.inf, jnp.where(z == last, -ids.astype(jnp.float32), -jnp.inf))
    chosen = jax.lax.top_k(rank, k)[1]
    z, ids = (jnp.take_along_axis(x, chosen, axis=-1) for x in (z, ids))
    negative_z, ids = jax.lax.sort((-z, ids), num_keys=2)
    return -negative_z, ids


def divisor(temperature: jax.Array) -> jax.Array:
    """What logits are divided by: the temperature, or 1 where it is 0."""
    return jnp.where(temperature > 0, temperature, 1.0)


def check_temperature(temperature: float | jax.Array) -> None:
    """Raises UserError unless it is a scalar; if it is known and below 0, or not finite."""
    _check_scalar("temperature", temperature)
    if not are_known(temperature):
        return
    values = np.asarray(temperature)
    if not np.all((values >= 0) & (values < np.inf)):
        raise UserError(f"temperature={temperature}: must be at least 0, and finite")


def check_top_p(top_p: float | jax.Array | None) -> None:
    """Raises UserError unless it is a scalar or None; if it is known and outside of (0, 1]."""
    if top_p is None:
        return
    _check_scalar("top_p", top_p)
    if not are_known(top_p):
        return
    values = np.asarray(top_p)
    if not np.all((values > 0) & (values <= 1)):
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1")


def check_k(k: int, vocab_size: int) -> None:
    """Raises UserError unless k is an integer in 1 .. vocab_size."""
    if not isinstance(k, int | np.integer):
        raise UserError(f"top_k={k}: must be an integer, known before compilation")
    if not 1 <= k <= vocab_size:
        raise UserError(f"top_k={k}: must be in 1 .. {vocab_size}")


def _check_scalar(name: str, x: float | jax.Array) -> None:
    if np.ndim(x):
        raise UserError(f"{name} has shape {np.shape(x)}; it must be a scalar (or use jax.vmap)")


def _top_k(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    check_k(k, logits.shape[-1])
    return jax.lax.top_k(logits, k)
