"""The loss of any number of codebooks, by whichever exact path is the cheapest.

M = 1 and M = 2 without scales close (`closed_form`, `bilinear`); everything else is streamed over
the vocabulary (`streaming`). Tokens with vectors of their own ("tiers": the most frequent ones
carry most of the loss) stand beside the codes:
    Z = sum over own tokens of exp(own_logits + bias)  +  Z of the codes of all other tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vqcx_jax.ops.codebook import bilinear, closed_form, multi, scatter, streaming
from vqcx_jax.ops.codebook.checks import check_per_token


class Own(NamedTuple):
    """Tokens whose logits do not come from codes.

    Attributes:
        tokens: int (T,), distinct.
        logits: float32 (..., T), without bias.
    """

    tokens: jax.Array
    logits: jax.Array


def log_z(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    product_dtype: DTypeLike = "float32",
) -> jax.Array:
    """logsumexp_v of z_v = scale[v] sum_m code_logits[m][assignment[v, m]] + bias[v].

    Args:
        code_logits: M arrays, float32 (..., K_m). assignment: int (V, M), column m in [0, K_m).
        bias, scale: (V,) or None.
        product_dtype: as in `streaming.log_z`; closed forms are float32.

    Returns:
        float32 (...).

    Raises:
        UserError: assignment is not (V, M), or bias or scale is not (V,).
    """
    multi.check_assignment(code_logits, assignment)
    check_per_token("bias", bias, assignment.shape[0])
    check_per_token("scale", scale, assignment.shape[0])
    sizes = tuple(l.shape[-1] for l in code_logits)
    if scale is None and len(sizes) == 1:
        log_mass = closed_form.code_log_mass(assignment[:, 0], sizes[0], bias)
        return jax.nn.logsumexp(code_logits[0] + log_mass, axis=-1)
    if scale is None and len(sizes) == 2:
        return bilinear.log_z(
            code_logits, bilinear.cell_log_mass(assignment, (sizes[0], sizes[1]), bias)
        )
    return streaming.log_z(code_logits, assignment, bias, scale, product_dtype=product_dtype)


def nll(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    own: Own | None = None,
    *,
    product_dtype: DTypeLike = "float32",
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and log Z.

    Args:
        targets: int (...), values in [0, V). Others as in `log_z`; codes of own tokens are not
            used.

    Returns:
        nll, log_z: float32 (...).
    """
    if own is None:
        z = log_z(code_logits, assignment, bias, scale, product_dtype=product_dtype)
        return z - multi.target_logits(code_logits, assignment, targets, bias, scale), z
    vocab_size = assignment.shape[0]
    bias_V = jnp.zeros((vocab_size,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    is_own_V = jnp.zeros((vocab_size,), bool).at[own.tokens].set(True)
    bias_of_rest_V = jnp.where(is_own_V, -jnp.inf, bias_V)
    rest = log_z(code_logits, assignment, bias_of_rest_V, scale, product_dtype=product_dtype)
    own_z = jax.nn.logsumexp(own.logits + bias_V[own.tokens], axis=-1)
    z = jnp.logaddexp(own_z, rest)
    # A masked sum instead of a gather: its gradient is dense arithmetic, not a scatter.
    is_target = own.tokens == targets[..., None]
    of_own = jnp.sum(jnp.where(is_target, own.logits, 0.0), axis=-1)
    of_codes = multi.target_logits(code_logits, assignment, targets, None, scale)
    return z - (jnp.where(is_own_V[targets], of_own, of_codes) + bias_V[targets]), z


def logits(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    own: Own | None = None,
) -> jax.Array:
    """V logits, for when somebody asks for them: float32 (..., V). Arguments as in `nll`."""
    if own is None:
        return scatter.logits(code_logits, assignment, bias, scale)
    z = scatter.logits(code_logits, assignment, None, scale)
    z = z.at[..., own.tokens].set(own.logits)
    return z if bias is None else z + bias.astype(jnp.float32)
