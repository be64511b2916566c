"""VQ-Logits without V-sized activations: tokens of one code share a logit, so sums close.

With l = codes . h and z_v = l[assignment[v]] + bias[v],
    log Z = logsumexp_v z_v = logsumexp_k (l_k + s_k),   s_k = logsumexp_{v: assignment[v]=k} bias_v
(s_k = log n_k without a bias, n_k the tokens of code k). K numbers per position replace V.
Everything here is float32 from the code logits on, whatever the dtype of h and codes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops import dispatch
from vqcx_jax.ops.checks import check_per_token, check_targets
from vqcx_jax.ops.codebook.checks import check_codes
from vqcx_jax.ops.gather import take
from vqcx_jax.ops.labels import nan_if_counted, nan_unless_tokens
from vqcx_jax.ops.product import product
from vqcx_jax.ops.soft_cap import soft_cap
from vqcx_jax.ops.softmax import resident, summed


def code_logits(h: jax.Array, codes: jax.Array) -> jax.Array:
    """l_k = codes[k] . h, accumulated in float32.

    Args:
        h: (..., D). codes: (K, D) of the same dtype.

    Returns:
        float32 (..., K).
    """
    return product(h, codes)


def code_log_mass(
    assignment: jax.Array, num_codes: int, bias: jax.Array | None = None
) -> jax.Array:
    """s_k, the log of the summed exp(bias) of code k's tokens; -inf for a code without tokens.

    Args:
        assignment: int (V,), values in [0, num_codes).
        bias: (V,) or None for zero.

    Returns:
        float32 (num_codes,).

    Raises:
        UserError: bias is not (V,).
    """
    check_per_token("bias", bias, assignment.shape[0])
    if bias is None:
        bias = jnp.zeros(assignment.shape, jnp.float32)
    return _log_mass(bias.astype(jnp.float32), assignment, num_codes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_mass(bias_V: jax.Array, assignment_V: jax.Array, num_codes: int) -> jax.Array:
    # Subtracting each code's own maximum keeps exp() in range.
    peak_K = jax.ops.segment_max(bias_V, assignment_V, num_codes)
    peak_K = jnp.where(jnp.isfinite(peak_K), peak_K, 0.0)
    e_V = jnp.exp(bias_V - take(peak_K, assignment_V))
    mass_K = jax.ops.segment_sum(e_V, assignment_V, num_codes)
    occupied_K = mass_K > 0
    return jnp.where(occupied_K, jnp.log(jnp.where(occupied_K, mass_K, 1.0)) + peak_K, -jnp.inf)


@_log_mass.defjvp
def _(num_codes: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Of code k, sum of p(v | k) d bias_v, p = exp(bias - s): nothing of V numbers is kept."""
    bias_V, assignment_V = primals
    s_K = _log_mass(bias_V, assignment_V, num_codes)

    @jax.checkpoint
    def along(bias_V: jax.Array, s_K: jax.Array, d_bias_V: jax.Array) -> jax.Array:
        s_V = take(s_K, assignment_V)
        p_V = jnp.where(s_V > -jnp.inf, jnp.exp(bias_V - s_V), 0.0)
        return jax.ops.segment_sum(p_V * d_bias_V, assignment_V, num_codes)

    return s_K, along(bias_V, s_K, tangents[0])


def nll(
    h: jax.Array,
    codes: jax.Array,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log p(target | h) and log Z, equal to `reference.nll`, in O(K) per position.

    Args:
        h: (..., D). codes: (K, D). assignment: int (V,), values in [0, K).
        targets: int (...), values in [0, V).
        bias: (V,) or None.
        cap: soft-cap of the code logits, see `ops.soft_cap`; None: as they are.

    Returns:
        nll, log_z: float32 (...).

    Raises:
        UserError: bias is not (V,), targets are not one for each h, more codes than tokens; where
            values are known, codes or targets out of range. Under jit nll of such targets is NaN;
            codes are for `check_codes`, once, before.
    """
    num_codes = codes.shape[0]
    _check(h, codes, assignment, targets, bias)
    l = soft_cap(code_logits(h, codes), cap)
    log_z = jax.nn.logsumexp(l + code_log_mass(assignment, num_codes, bias), axis=-1)
    # A masked sum instead of a gather: its gradient is dense arithmetic, not a scatter.
    is_target = jnp.arange(num_codes) == take(assignment, targets)[..., None]
    target_logit = jnp.sum(jnp.where(is_target, l, 0.0), axis=-1)
    if bias is not None:
        target_logit = target_logit + take(bias.astype(jnp.float32), targets)
    return nan_unless_tokens(log_z - target_logit, targets, assignment.shape[0]), log_z


def summed_nll(
    h: jax.Array,
    codes: jax.Array,
    assignment: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    bias: jax.Array | None = None,
    z_loss: float | jax.Array = 0.0,
    *,
    cap: float | None = None,
    token_block: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of nll + z_loss log(Z)^2, and of nll, over the positions that count.

    It is the summed loss of a softmax over codes with biases s, and that of tokens in their codes,
    s_k - bias_v, which depends on no hidden state. Under `shard_map` the sums are of each device's
    own positions.

    Args:
        counts: bool (...), which positions count.
        z_loss: coefficient of log(Z)^2.
        token_block: positions whose K logits are held at a time, for less memory in more time, see
            `softmax.summed_nll`; it has no kernel. None: all of them.
        implementation: of `softmax.resident.summed_nll`. Others as in `nll`.

    Returns:
        loss, nll: float32 (). nll is there to be reported; its gradient is zero.

    Raises:
        UserError: as `nll`, and as `softmax.resident.summed_nll`; token_block is not positive, or a
            kernel is asked for with it.
    """
    _check(h, codes, assignment, targets, bias)
    if token_block is not None and implementation not in (None, dispatch.XLA):
        raise UserError(
            f"implementation={implementation!r}: must be 'xla' or None, as token_block is "
            f"{token_block}"
        )
    log_mass_K = code_log_mass(assignment, codes.shape[0], bias)
    target_codes = take(assignment, targets)
    args = (h, codes, target_codes, counts, log_mass_K, z_loss)
    if token_block is None:
        loss, nll = resident.summed_nll(*args, cap=cap, implementation=implementation)
    else:
        loss, nll = summed.summed_nll(*args, cap=cap, token_block=token_block)
    of_tokens = take(log_mass_K, target_codes)
    if bias is not None:
        of_tokens = of_tokens - take(bias.astype(jnp.float32), targets)
    total = jnp.sum(of_tokens, where=counts) + nan_if_counted(targets, counts, assignment.shape[0])
    return loss + total, nll + jax.lax.stop_gradient(total)


def logits(
    h: jax.Array, codes: jax.Array, assignment: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """V logits: K code logits scattered to the vocabulary. For when somebody asks for them.

    Returns:
        float32 (..., V).

    Raises:
        UserError: bias is not (V,); codes out of range, where they are known.
    """
    check_codes(assignment, codes.shape[0])
    check_per_token("bias", bias, assignment.shape[0])
    z = code_logits(h, codes)[..., assignment]
    return z if bias is None else z + bias.astype(jnp.float32)


def _check(
    h: jax.Array,
    codes: jax.Array,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None,
) -> None:
    check_codes(assignment, codes.shape[0])
    check_targets(targets, assignment.shape[0], h.shape[:-1])
    check_per_token("bias", bias, assignment.shape[0])
