"""Two codebooks in closed form: 2 N K1 K2 FLOPs instead of N V D, and no array of V columns.

Tokens of one cell (i, j) share their code logits, so that with B_ij = sum of exp(bias_v) over
the tokens of the cell
    Z = sum_v exp(l1[i_v] + l2[j_v] + bias_v) = exp(l1)^T B exp(l2),
a matrix product for many positions at once.

Range. The product is computed with l1, l2 and log B shifted to a maximum of 0. When no token
joins the best i with the best j, Z can be smaller than float32 holds: it underflows where log Z
is 87 below max l1 + max l2 + max log B, and terms of it are lost before. What is lost is at most
6 K1 K2 tiny (tiny = 2^-126; each of the K1 K2 terms can be flushed to zero as one of three
factors or of three products), so Z >= `least_z` is right to float32's rounding. Positions below
that, 58 nats at K1 K2 = 50,000, are computed again from the cells themselves, without a product:
K1 K2 exponentials each, as a full softmax has, and the same accuracy. When there is no such
position nothing is spent.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.errors import UserError
from vqcx_jax.ops.checks import check_targets
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.codebook.checks import check_codes
from vqcx_jax.ops.codebook.closed_form import code_log_mass
from vqcx_jax.ops.labels import nan_unless_tokens
from vqcx_jax.ops.varying import varying_like

_TINY = float(np.finfo(np.float32).tiny)
_EPS = float(np.finfo(np.float32).eps)

# Positions recomputed at a time: enough to fill an accelerator, few enough to hold K1 K2 each.
_BLOCK = 4

_Residuals = tuple[jax.Array, ...]


def cells(assignment: jax.Array, num_codes: tuple[int, int]) -> jax.Array:
    """Of each token, i K2 + j: int (V,). Arguments as in `cell_log_mass`."""
    return assignment[:, 0] * num_codes[1] + assignment[:, 1]


def cell_log_mass(
    assignment: jax.Array, num_codes: tuple[int, int], bias: jax.Array | None = None
) -> jax.Array:
    """Log B_ij, the log of the summed exp(bias) of cell (i, j)'s tokens; -inf without tokens.

    Args:
        assignment: int (V, 2), values in [0, num_codes[0]) and [0, num_codes[1]).
        bias: (V,) or None for zero.

    Returns:
        float32 num_codes.
    """
    cells_V = cells(assignment, num_codes)
    return code_log_mass(cells_V, num_codes[0] * num_codes[1], bias).reshape(num_codes)


def log_z(code_logits: multi.CodeLogits, log_mass: jax.Array) -> jax.Array:
    """Log of exp(l1)^T exp(log_mass) exp(l2), at any size of the logits.

    Args:
        code_logits: l1, float32 (..., K1), and l2, float32 (..., K2).
        log_mass: float32 (K1, K2), from `cell_log_mass`.

    Returns:
        float32 (...).
    """
    l1, l2 = code_logits
    rows = [l.reshape(-1, l.shape[-1]) for l in (l1, l2)]
    return _log_z(*rows, varying_like(log_mass, l1)).reshape(l1.shape[:-1])


def nll(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and log Z, equal to `reference.nll_of_logits`, for two codebooks.

    Args:
        code_logits: float32 (..., K1) and (..., K2), from `multi`.
        assignment: int (V, 2), column m in [0, K_m). targets: int (...), values in [0, V).
        bias: (V,) or None.

    Returns:
        nll, log_z: float32 (...).

    Raises:
        UserError: not two codebooks, assignment not (V, 2), bias not (V,), or targets are not one
            for each position; codes or targets out of range, where they are known (under jit nll of
            such targets is NaN).
    """
    if len(code_logits) != 2:
        raise UserError(f"code_logits has {len(code_logits)} codebooks; the bilinear form takes 2")
    multi.check_assignment(code_logits, assignment)
    l1, l2 = code_logits
    check_codes(assignment, (l1.shape[-1], l2.shape[-1]))
    check_targets(targets, assignment.shape[0], l1.shape[:-1])
    z = log_z(code_logits, cell_log_mass(assignment, (l1.shape[-1], l2.shape[-1]), bias))
    nll = z - multi.target_logits(code_logits, assignment, targets, bias)
    return nan_unless_tokens(nll, targets, assignment.shape[0]), z


@jax.custom_vjp
def _log_z(l1_NxI: jax.Array, l2_NxJ: jax.Array, log_mass_IxJ: jax.Array) -> jax.Array:
    return _forward(l1_NxI, l2_NxJ, log_mass_IxJ)[0]


def _forward(
    l1_NxI: jax.Array, l2_NxJ: jax.Array, log_mass_IxJ: jax.Array
) -> tuple[jax.Array, _Residuals]:
    e1_NxI, peak1_N = _exp_from_peak(l1_NxI, -1)
    e2_NxJ, peak2_N = _exp_from_peak(l2_NxJ, -1)
    mass_IxJ, peak_mass = _exp_from_peak(log_mass_IxJ, (0, 1))
    terms_NxI = e1_NxI * _matmul(e2_NxJ, mass_IxJ.T)
    z_N = jnp.sum(terms_NxI, axis=-1)
    is_low_N = z_N < least_z(mass_IxJ.size)  # NaN is not: it needs no second computation.
    z_N = jnp.where(is_low_N, 1.0, z_N)  # Any positive number, until recompute() replaces it.

    def recompute(log_z_N: jax.Array, rows_P: jax.Array) -> jax.Array:
        cells_PxIxJ = _cells(l1_NxI, l2_NxJ, log_mass_IxJ, rows_P)
        exact_P = jax.nn.logsumexp(cells_PxIxJ, axis=(1, 2))
        return log_z_N.at[rows_P].set(exact_P, mode="drop")

    log_z_N = jnp.log(z_N) + peak1_N + peak2_N + peak_mass
    log_z_N = _fold_rows(is_low_N, recompute, log_z_N)
    return log_z_N, (l1_NxI, l2_NxJ, log_mass_IxJ, terms_NxI, z_N, is_low_N)


def _backward(residuals: _Residuals, g_N: jax.Array) -> _Residuals:
    l1_NxI, l2_NxJ, log_mass_IxJ, terms_NxI, z_N, is_low_N = residuals
    e1_NxI, e2_NxJ = (_exp_from_peak(l, -1)[0] for l in (l1_NxI, l2_NxJ))
    mass_IxJ, _ = _exp_from_peak(log_mass_IxJ, (0, 1))
    scale_Nx1 = jnp.where(is_low_N, 0.0, g_N / z_N)[:, None]
    e1_NxI = scale_Nx1 * e1_NxI
    gradients = (
        scale_Nx1 * terms_NxI,
        e2_NxJ * _matmul(e1_NxI, mass_IxJ),
        mass_IxJ * _matmul(e1_NxI.T, e2_NxJ),
    )

    def recompute(gradients: _Residuals, rows_P: jax.Array) -> _Residuals:
        d_l1_NxI, d_l2_NxJ, d_log_mass_IxJ = gradients
        p_PxIxJ = jax.nn.softmax(_cells(l1_NxI, l2_NxJ, log_mass_IxJ, rows_P), axis=(1, 2))
        g_P = g_N.at[rows_P].get(mode="fill", fill_value=0.0)
        d_PxIxJ = g_P[:, None, None] * p_PxIxJ
        return (
            d_l1_NxI.at[rows_P].set(jnp.sum(d_PxIxJ, axis=2), mode="drop"),
            d_l2_NxJ.at[rows_P].set(jnp.sum(d_PxIxJ, axis=1), mode="drop"),
            d_log_mass_IxJ + jnp.sum(d_PxIxJ, axis=0),
        )

    return _fold_rows(is_low_N, recompute, gradients)


_log_z.defvjp(_forward, _backward)


def least_z(num_cells: int) -> float:
    """A shifted Z from here on has lost less than half a rounding to underflow."""
    return 12 * num_cells * _TINY / _EPS


def _exp_from_peak(x: jax.Array, axis: int | tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """exp(x - peak) and peak, the maximum of x along axis."""
    peak = jnp.max(x, axis, keepdims=True)
    return jnp.exp(x - peak), jnp.squeeze(peak, axis)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Accelerators would round the factors to bfloat16 or TF32 by default."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _cells(
    l1_NxI: jax.Array, l2_NxJ: jax.Array, log_mass_IxJ: jax.Array, rows_P: jax.Array
) -> jax.Array:
    """Logits of the cells of some rows, (P, I, J). An index past the end gets the last row."""
    l1_PxI, l2_PxJ = (l.at[rows_P].get(mode="clip") for l in (l1_NxI, l2_NxJ))
    return l1_PxI[:, :, None] + l2_PxJ[:, None, :] + log_mass_IxJ


def _fold_rows(is_chosen_N: jax.Array, step: Callable[[Any, jax.Array], Any], init: Any) -> Any:
    """Carry = step(carry, rows_P) over the chosen rows, P at a time; the last filled up with N."""
    n = is_chosen_N.shape[0]
    if n == 0:
        return init
    num_blocks = -(-n // _BLOCK)
    (rows,) = jnp.nonzero(is_chosen_N, size=num_blocks * _BLOCK, fill_value=n)
    blocks = rows.reshape(num_blocks, _BLOCK)
    num_used = (jnp.sum(is_chosen_N) + _BLOCK - 1) // _BLOCK
    return jax.lax.fori_loop(0, num_used, lambda b, carry: step(carry, blocks[b]), init)
