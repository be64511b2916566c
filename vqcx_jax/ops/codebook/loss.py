"""The loss of any number of codebooks, by whichever exact path is the cheapest.

M = 1 and M = 2 without scales close (`closed_form`, `bilinear`); everything else is streamed over
the vocabulary (`streaming`). Tokens with vectors of their own ("tiers": the most frequent ones
carry most of the loss) stand beside the codes:
    Z = sum over own tokens of exp(own_logits + bias)  +  Z of the codes of all other tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vqcx_jax.errors import UserError
from vqcx_jax.ops import dispatch
from vqcx_jax.ops.checks import check_per_token, check_targets
from vqcx_jax.ops.codebook import bilinear, closed_form, multi, pairs, scatter, streaming
from vqcx_jax.ops.codebook.checks import check_codes
from vqcx_jax.ops.gather import take
from vqcx_jax.ops.labels import nan_if_counted, nan_unless_tokens
from vqcx_jax.ops.sampling import first_of_sorted


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
    implementation: str | None = None,
    product_dtype: DTypeLike = "float32",
) -> jax.Array:
    """logsumexp_v of z_v = scale[v] sum_m code_logits[m][assignment[v, m]] + bias[v].

    Args:
        code_logits: M arrays, float32 (..., K_m). assignment: int (V, M), column m in [0, K_m).
        bias, scale: (V,) or None.
        implementation, product_dtype: as in `streaming.log_z`; closed forms are plain JAX, float32.

    Returns:
        float32 (...).

    Raises:
        UserError: assignment is not (V, M), or bias or scale is not (V,); more codes than tokens
            and, where values are known, codes out of range; a kernel is asked for where the loss
            closes.
    """
    multi.check_assignment(code_logits, assignment)
    check_codes(assignment, [l.shape[-1] for l in code_logits])
    check_per_token("bias", bias, assignment.shape[0])
    check_per_token("scale", scale, assignment.shape[0])
    sizes = tuple(l.shape[-1] for l in code_logits)
    closes = scale is None and len(sizes) <= 2
    if closes and implementation not in (None, dispatch.XLA):
        raise UserError(
            f"implementation={implementation!r}: must be 'xla' or None, log Z of {len(sizes)} "
            "codebooks is a closed form in plain JAX"
        )
    if closes and len(sizes) == 1:
        log_mass = closed_form.code_log_mass(assignment[:, 0], sizes[0], bias)
        return jax.nn.logsumexp(code_logits[0] + log_mass, axis=-1)
    if closes:
        return bilinear.log_z(
            code_logits, bilinear.cell_log_mass(assignment, (sizes[0], sizes[1]), bias)
        )
    return streaming.log_z(
        code_logits,
        assignment,
        bias,
        scale,
        implementation=implementation,
        product_dtype=product_dtype,
    )


def nll(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    own: Own | None = None,
    *,
    implementation: str | None = None,
    product_dtype: DTypeLike = "float32",
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and log Z.

    Args:
        targets: int (...), values in [0, V). Others as in `log_z`; codes of own tokens are not
            used.

    Returns:
        nll, log_z: float32 (...).

    Raises:
        UserError: as `log_z`; targets are not one for each position or, where they are known, out
            of range (under jit their nll is NaN).
    """
    vocab_size = assignment.shape[0]
    check_targets(targets, vocab_size, code_logits[0].shape[:-1])
    log_z_of = functools.partial(
        log_z, code_logits, assignment, implementation=implementation, product_dtype=product_dtype
    )
    if own is None:
        z = log_z_of(bias, scale)
        nll = z - multi.target_logits(code_logits, assignment, targets, bias, scale)
        return nan_unless_tokens(nll, targets, vocab_size), z
    bias_V = _bias_of_all(assignment, bias)
    rest = log_z_of(_bias_of_rest(bias_V, own), scale)
    own_z = jax.nn.logsumexp(own.logits + bias_V[own.tokens], axis=-1)
    z = jnp.logaddexp(own_z, rest)
    # A masked sum instead of a gather: its gradient is dense arithmetic, not a scatter.
    is_target = own.tokens == targets[..., None]
    of_own = jnp.sum(jnp.where(is_target, own.logits, 0.0), axis=-1)
    of_codes = multi.target_logits(code_logits, assignment, targets, None, scale)
    is_own = jnp.any(is_target, axis=-1)
    nll = z - (jnp.where(is_own, of_own, of_codes) + bias_V[targets])
    return nan_unless_tokens(nll, targets, vocab_size), z


def summed_nll(
    h: jax.Array,
    codebooks: tuple[jax.Array, jax.Array],
    assignment: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    bias: jax.Array | None = None,
    z_loss: float | jax.Array = 0.0,
    *,
    form: multi.Form = "additive",
    cap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of nll + z_loss log(Z)^2, and of nll, over the positions that count; two codebooks.

    Under `shard_map` the sums are of each device's own positions.

    Args:
        h: (..., D). codebooks: (K1, D1) and (K2, D2), see `pairs.summed_nll`.
        assignment: int (V, 2), column m in [0, K_m). targets: int (...), values in [0, V).
        counts: bool (...), which positions count.
        bias: (V,) or None.
        z_loss: coefficient of log(Z)^2.
        cap: soft-cap of the code logits of each codebook. implementation: of `pairs.summed_nll`.

    Returns:
        loss, nll: float32 (). nll is there to be reported; its gradient is zero.

    Raises:
        UserError: not two codebooks, bias is not (V,), targets are not one for each h, codes or
            targets out of range where they are known (under jit sums are NaN if such targets
            count), and as `pairs.summed_nll`.
    """
    multi.check_assignment(codebooks, assignment)
    if len(codebooks) != 2:
        raise UserError(f"codebooks: are {len(codebooks)}, must be 2")
    check_per_token("bias", bias, assignment.shape[0])
    num_codes = len(codebooks[0]), len(codebooks[1])
    check_codes(assignment, num_codes)
    check_targets(targets, assignment.shape[0], h.shape[:-1])
    log_mass_IxJ = bilinear.cell_log_mass(assignment, num_codes, bias)
    # One gather instead of two; of rows of two, a TPU would make a copy with 128 lanes each.
    cells_of_targets = take(bilinear.cells(assignment, num_codes), targets)
    codes = cells_of_targets // num_codes[1], cells_of_targets % num_codes[1]
    loss, nll = pairs.summed_nll(
        h,
        codebooks,
        log_mass_IxJ,
        codes,
        counts,
        z_loss,
        form=form,
        cap=cap,
        implementation=implementation,
    )
    total = nan_if_counted(targets, counts, assignment.shape[0])
    if bias is not None:
        total = total - jnp.sum(take(bias.astype(jnp.float32), targets), where=counts)
    return loss + total, nll + jax.lax.stop_gradient(total)


def logits(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    own: Own | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """V logits, for when somebody asks for them: float32 (..., V).

    Arguments as in `nll`, implementation as in `scatter.logits`.
    """
    if own is None:
        return scatter.logits(code_logits, assignment, bias, scale, implementation=implementation)
    z = scatter.logits(code_logits, assignment, None, scale, implementation=implementation)
    z = z.at[..., own.tokens].set(own.logits)
    return z if bias is None else z + bias.astype(jnp.float32)


def top_k(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    k: int,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    own: Own | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k largest of `logits`, their tokens, and log Z, see `streaming.top_k`."""
    if own is None:
        return streaming.top_k(
            code_logits, assignment, k, bias, scale, implementation=implementation
        )
    bias_V = _bias_of_all(assignment, bias)
    rest_z, rest, log_z_of_rest = streaming.top_k(
        code_logits,
        assignment,
        k,
        _bias_of_rest(bias_V, own),
        scale,
        implementation=implementation,
    )
    own_z = own.logits + bias_V[own.tokens]
    tokens = jnp.broadcast_to(own.tokens, own_z.shape)
    listed = jnp.concatenate([rest_z, own_z], -1), jnp.concatenate([rest, tokens], -1)
    log_z = jnp.logaddexp(jax.nn.logsumexp(own_z, axis=-1), log_z_of_rest)
    return *first_of_sorted(*listed, k), log_z


def _bias_of_all(assignment: jax.Array, bias: jax.Array | None) -> jax.Array:
    zeros = jnp.zeros(assignment.shape[:1], jnp.float32)
    return zeros if bias is None else bias.astype(jnp.float32)


def _bias_of_rest(bias_V: jax.Array, own: Own) -> jax.Array:
    """-inf for own tokens, whose codes are not used."""
    return bias_V.at[own.tokens].set(-jnp.inf)
