"""What the TPU kernels of codes share: code logits and tokens in tiles, and the matrix S.

Column v of the (C, V) matrix S, C = sum of the K_m, has a one at the code of each codebook, so that
    z = l S,  d l = d z S^T
are products for the matrix unit, with C in place of D. A tile's columns of S are made of its codes
in vector memory. Exact where l is: a product with ones and zeros rounds nothing.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.tpu import LANES, up
from vqcx_jax.ops.varying import varying_like

_CODES = 16  # Rows of S come in multiples: a register of bfloat16 has so many sublanes.
_MAX_CODES = 4096


class Tile(NamedTuple):
    """Attributes: positions and tokens of a tile; row_block, positions whose logits are held."""

    positions: int
    tokens: int
    row_block: int

    def within(self, num_positions: int, vocab_size: int) -> "Tile":
        """Not larger than the problem, which is rounded up to whole registers."""
        positions = min(self.positions, up(num_positions, 16))
        tokens = min(self.tokens, up(vocab_size, LANES))
        whole = positions % self.row_block == 0
        return Tile(positions, tokens, self.row_block if whole else positions)

    def rows(self) -> Iterator[slice]:
        """The row blocks of a tile."""
        for start in range(0, self.positions, self.row_block):
            yield slice(start, start + self.row_block)


class Tokens(NamedTuple):
    """Padded to whole tiles: codes int32 (M, V), scale float32 (1, V) or None, bias (1, V)."""

    codes: jax.Array
    scale: jax.Array | None
    bias: jax.Array


def padded_num_codes(num_codes: Sequence[int]) -> tuple[int, ...]:
    """Rows of S for codebooks of K_m codes: whole registers, together a multiple of the lanes.

    Raises:
        NotSupported: they are more than 4096.
    """
    rows = [up(n, _CODES) for n in num_codes]
    rows[-1] += up(sum(rows), LANES) - sum(rows)
    if sum(rows) > _MAX_CODES:
        raise NotSupported(f"{sum(rows)} code logits; at most {_MAX_CODES} are supported")
    return tuple(rows)


def pad_codes(codebooks_MxKxW: jax.Array) -> jax.Array:
    """Code vectors 0 up to whole registers of codes."""
    _, num_codes, _ = codebooks_MxKxW.shape
    return jnp.pad(codebooks_MxKxW, ((0, 0), (0, -num_codes % _CODES), (0, 0)))


def check_product_dtype(dtype: DTypeLike) -> None:
    """Raises UserError unless it is float32 or bfloat16."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise UserError(f"product_dtype={dtype}: must be float32 or bfloat16")


def joined(
    code_logits: multi.CodeLogits,
    num_codes: tuple[int, ...],
    num_positions: int,
    dtype: DTypeLike,
    factor: float = 1.0,
) -> jax.Array:
    """Factor times the code logits side by side, (N, C), zeros where there are none.

    Args:
        num_codes: `padded_num_codes`. num_positions: N. dtype: float32 or bfloat16.

    Raises:
        UserError: another dtype.
    """
    check_product_dtype(dtype)
    rows = (l.reshape(-1, l.shape[-1]) for l in code_logits)
    wide = [
        jnp.pad(l, ((0, num_positions - l.shape[0]), (0, n - l.shape[1])))
        for l, n in zip(rows, num_codes, strict=True)
    ]
    return (factor * jnp.concatenate(wide, axis=1).astype(jnp.float32)).astype(dtype)


def tokens(
    assignment: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    vocab_size: int,
    like: jax.Array,
    factor: float = 1.0,
) -> Tokens:
    """Codes, scales and factor times the biases; padding is impossible tokens.

    Args:
        vocab_size: with padding. like: for `varying_like`.
    """
    padding = vocab_size - len(assignment)
    if bias is None:
        bias = jnp.zeros(assignment.shape[:1], jnp.float32)
    bias_V = jnp.pad(factor * bias.astype(jnp.float32), (0, padding), constant_values=-jnp.inf)
    scale_V = None if scale is None else jnp.pad(scale.astype(jnp.float32), (0, padding))[None]
    codes_MxV = jnp.pad(assignment.astype(jnp.int32), ((0, padding), (0, 0))).T
    padded = Tokens(codes_MxV, scale_V, bias_V[None])
    return jax.tree.map(lambda x: varying_like(x, like), padded)


def token_specs(padded: Tokens, size: int, index: Any) -> Tokens:
    """Block specs of a tile of `size` tokens."""
    return jax.tree.map(lambda x: pl.BlockSpec((x.shape[0], size), index), padded)


def selection(codes_ref: Any, num_codes: tuple[int, ...]) -> jax.Array:
    """Columns of S for the codes (M, T) of a tile: bfloat16 (C, T)."""
    size = codes_ref.shape[1]
    codes_MxT = codes_ref[...].astype(jnp.int32)
    rows = [
        codes_MxT[m : m + 1] == jax.lax.broadcasted_iota(jnp.int32, (n, size), 0)
        for m, n in enumerate(num_codes)
    ]
    return jnp.concatenate([of_codebook.astype(jnp.bfloat16) for of_codebook in rows], axis=0)


def logits(tile: Tokens, sums_RxT: jax.Array) -> jax.Array:
    """Token logits of sums of code logits, in a kernel."""
    if tile.scale is not None:
        sums_RxT = sums_RxT * tile.scale[...]
    return sums_RxT + tile.bias[...]


def dot(x: jax.Array, s_CxT: jax.Array, transposed: bool = False) -> jax.Array:
    """The product x S, or x S^T, accumulated in float32, for S in bfloat16.

    A float32 x goes as three bfloat16 parts, which is all of it: half of the work of a float32
    product, whose parts of S would be zeros.
    """
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=dimensions, preferred_element_type=jnp.float32
    )
    if x.dtype == jnp.bfloat16:
        return product(x, s_CxT)
    high = x.astype(jnp.bfloat16)
    rest = x - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    low = (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)
    return (product(low, s_CxT) + product(middle, s_CxT)) + product(high, s_CxT)
