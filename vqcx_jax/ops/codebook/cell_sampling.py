"""Tokens drawn from the code logits of two codebooks, or one, without V logits.

Tokens of a cell, those that share all codes, take the place of those of a code in `sampling`: a
cell is drawn by its row, the first code, and then its column, and then a token of the cell. At a
temperature T, with l1 and l2 the code logits and B_ij the summed exp(bias / T) of a cell's tokens,
    p(row i) ~ exp(l1_i / T) sum_j B_ij exp(l2_j / T),    p(column j | i) ~ B_ij exp(l2_j / T).
All sums over j are one product with a matrix that stays while decoding. Where that underflows at
any position (see `bilinear`), as at low temperatures, all get an exponential for each of their
cells, I J numbers a position.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.ops import sampling
from vqcx_jax.ops.codebook.bilinear import least_z
from vqcx_jax.ops.codebook.multi import CodeLogits
from vqcx_jax.ops.codebook.token_table import (
    Masses,
    TokenTable,
    draw_within,
    mass_of_first,
    token_masses,
    token_table,
)


class _Cells(NamedTuple):
    """What does not depend on code logits.

    Attributes:
        table, masses: of the cells' tokens, cell i J + j.
        divisor: float32 (), the temperature, 1 where it is 0.
        best_bias: float32 (I, J), the largest bias of a cell, -inf without tokens.
        log_mass: float32 (I, J): log B = best_bias / divisor + log_mass.
        peak_bias, peak: float32 (): log B = peak_bias / divisor + peak + log_b.
        log_b: float32 (I, J), at most 0.
    """

    table: TokenTable
    masses: Masses
    divisor: jax.Array
    best_bias: jax.Array
    log_mass: jax.Array
    peak_bias: jax.Array
    peak: jax.Array
    log_b: jax.Array


def cell_sampler(
    assignment: jax.Array,
    num_codes: tuple[int, ...],
    bias: jax.Array,
    own_tokens: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
) -> Callable[[CodeLogits, jax.Array | None, jax.Array], jax.Array]:
    """`sampling.sampler` for one or two codebooks, beside tokens with logits of their own.

    Args:
        assignment: int (V, M), column m in [0, num_codes[m]); M = 1 or 2.
        bias: float32 (V,).
        own_tokens: int (T,), distinct tokens whose codes are not used; None: none.
        temperature: 0: the lowest token of the largest of the V logits, whatever the key.

    Returns:
        (code_logits, own_logits, key) -> tokens: M arrays float32 (..., K_m); float32 (..., T)
        with biases, or None without own tokens; a typed PRNG key; int32 (...).

    Raises:
        UserError: as `ops.sampling.sample`.
    """
    sampling.check_temperature(temperature)
    temperature = jnp.asarray(temperature, jnp.float32)
    if own_tokens is not None:
        bias = bias.at[own_tokens].set(-jnp.inf)
    cells = _cells(assignment, num_codes, bias, sampling.divisor(temperature))
    num_rows, num_columns = cells.log_b.shape

    def draw(code_logits: CodeLogits, own_logits: jax.Array | None, key: jax.Array) -> jax.Array:
        l1, l2 = _both(code_logits)
        row_key, column_key, token_key = jax.random.split(key, 3)
        log_rows, log_columns, is_right = _by_product(cells, l1, l2, own_logits)

        def by_product() -> tuple[jax.Array, jax.Array]:
            row = sampling.draw(log_rows, row_key)
            of_row = cells.log_b[jnp.minimum(row, num_rows - 1)] + log_columns
            return row, sampling.draw(of_row, column_key)

        def by_cells() -> tuple[jax.Array, jax.Array]:
            log_rows, log_weights = _by_cells(cells, l1, l2, own_logits)
            row = sampling.draw(log_rows, row_key)
            index = jnp.minimum(row, num_rows - 1)[..., None, None]
            of_row = jnp.take_along_axis(log_weights, index, axis=-2)[..., 0, :]
            return row, sampling.draw(of_row, column_key)

        row, column = jax.lax.cond(jnp.all(is_right), by_product, by_cells)
        cell = jnp.minimum(row, num_rows - 1) * num_columns + column
        token = draw_within(cells.table, cells.masses, cell, cells.table.counts[cell], token_key)
        if own_tokens is not None:
            token = jnp.where(row < num_rows, token, own_tokens[row - num_rows])
        return token

    def greedy(code_logits: CodeLogits, own_logits: jax.Array | None, _: jax.Array) -> jax.Array:
        return _greedy(cells, *_both(code_logits), own_logits, own_tokens)

    return lambda *args: jax.lax.cond(temperature > 0, draw, greedy, *args)


def _cells(
    assignment: jax.Array, num_codes: tuple[int, ...], bias: jax.Array, divisor: jax.Array
) -> _Cells:
    num_rows, num_columns = (*num_codes, 1)[:2]
    cells = assignment[:, 0]
    if len(num_codes) == 2:
        cells = cells * num_columns + assignment[:, 1]
    table = token_table(cells, num_rows * num_columns, bias)
    masses = token_masses(table, divisor)
    log_mass = jnp.log(mass_of_first(table, masses, table.counts))
    best_bias, log_mass = (x.reshape(num_rows, num_columns) for x in (table.best_bias, log_mass))
    peak_bias = jnp.max(best_bias)
    log_b = (best_bias - peak_bias) / divisor + log_mass
    peak = jnp.max(log_b)
    return _Cells(table, masses, divisor, best_bias, log_mass, peak_bias, peak, log_b - peak)


def _both(code_logits: CodeLogits) -> tuple[jax.Array, jax.Array]:
    """Without a second codebook: one column."""
    l1 = code_logits[0]
    return l1, code_logits[1] if len(code_logits) == 2 else jnp.zeros_like(l1[..., :1])


def _by_product(
    cells: _Cells, l1: jax.Array, l2: jax.Array, own_logits: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log weights of rows, own tokens among them, and of columns, B apart; and if they are right.

    Returns:
        float32 (..., I) or (..., I + T). float32 (..., J). bool (...).
    """
    peak1, peak2 = (jnp.max(l, axis=-1, keepdims=True) for l in (l1, l2))
    log_rows, log_columns = (l1 - peak1) / cells.divisor, (l2 - peak2) / cells.divisor
    b_JxI = jnp.exp(cells.log_b).T
    summed = jnp.matmul(jnp.exp(log_columns), b_JxI, precision=jax.lax.Precision.HIGHEST)
    z = jnp.sum(jnp.exp(log_rows) * summed, axis=-1)
    is_right = z >= least_z(b_JxI.size)
    log_rows = log_rows + jnp.log(summed)
    if own_logits is not None:
        own = (own_logits - (peak1 + peak2 + cells.peak_bias)) / cells.divisor - cells.peak
        is_right &= jnp.max(own, axis=-1) < jnp.inf
        log_rows = jnp.concatenate([log_rows, own], axis=-1)
    return log_rows, log_columns, is_right


def _by_cells(
    cells: _Cells, l1: jax.Array, l2: jax.Array, own_logits: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Log weights of rows, own tokens among them, (..., I) or (..., I + T), and cells (..., I, J).

    Relative to the largest logit of all: a tiny temperature gives 0 and -inf.
    """
    best, peak = _best(cells, l1, l2, own_logits)
    log_weights = (best - peak[..., None, None]) / cells.divisor + cells.log_mass
    log_rows = jnp.log(jnp.sum(jnp.exp(log_weights), axis=-1))
    if own_logits is not None:
        own = (own_logits - peak[..., None]) / cells.divisor
        log_rows = jnp.concatenate([log_rows, own], axis=-1)
    return log_rows, log_weights


def _greedy(
    cells: _Cells,
    l1: jax.Array,
    l2: jax.Array,
    own_logits: jax.Array | None,
    own_tokens: jax.Array | None,
) -> jax.Array:
    best, peak = _best(cells, l1, l2, own_logits)
    (vocab_size,) = cells.table.tokens.shape
    first = cells.table.tokens[jnp.minimum(cells.table.starts, vocab_size - 1)]
    is_best = best == peak[..., None, None]
    of_cells = jnp.where(is_best, first.reshape(best.shape[-2:]), vocab_size)
    token = jnp.min(of_cells, axis=(-2, -1))
    if own_tokens is not None and own_logits is not None:
        of_own = jnp.where(own_logits == peak[..., None], own_tokens, vocab_size)
        token = jnp.minimum(token, jnp.min(of_own, axis=-1))
    return jnp.where(jnp.isnan(peak), 0, token)  # As argmax has it.


def _best(
    cells: _Cells, l1: jax.Array, l2: jax.Array, own_logits: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Logits of the best token of each cell, (..., I, J), and the largest of all, (...)."""
    best = l1[..., :, None] + l2[..., None, :] + cells.best_bias
    peak = jnp.max(best, axis=(-2, -1))
    if own_logits is not None:
        peak = jnp.maximum(peak, jnp.max(own_logits, axis=-1))
    return best, peak
