"""Pallas kernels for TPUs: a tile's token logits are one product with the matrix S of `tpu_tiles`.

Nothing with V columns is ever written, not for the most probable tokens either: the pass that sums
exponentials writes the largest logit of each group of tokens as well. The k best tokens are in the
k groups with the largest ones, and the logits of so few are made again, by gathers.

The loss is in powers of two, which is what exponentials are made of: l and bias come times log2 e.
The best tokens are not, as equal logits are to stay equal.

Tokens lie along lanes. Maxima and sums are kept for each of the 128 lanes, and taken over lanes
once, at the end. The backward kernel is that of `tpu_gradients`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from vqcx_jax.ops import device
from vqcx_jax.ops.codebook import multi, tpu_tiles
from vqcx_jax.ops.codebook.streaming.block_sizes import BlockSizes, block_sizes, top_k_tile
from vqcx_jax.ops.codebook.tpu_gradients import check_size, gradients
from vqcx_jax.ops.codebook.tpu_tiles import Tile, Tokens
from vqcx_jax.ops.sampling import first_of_sorted
from vqcx_jax.ops.tpu import LANES, VMEM_LIMIT, out_shape, up

_LOG2_E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)
# Whose tokens of k groups are listed at a time.
_LISTED_POSITIONS = 256


class _Static(NamedTuple):
    num_codes: tuple[int, ...]  # Rows of S for each codebook.
    blocks: BlockSizes
    interpret: Any


def log_z(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    product_dtype: DTypeLike = "float32",
    blocks: BlockSizes | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.log_z`.

    Args:
        blocks: None: those of the table for this device.
        interpret: `pltpu.InterpretParams` to run on a CPU.

    Raises:
        NotSupported: more than 4096 code logits, or so many tokens that their gradients by bias and
            scale do not fit vector memory.
        UserError: product_dtype is neither float32 nor bfloat16.
    """
    num_codes = tpu_tiles.padded_num_codes([l.shape[-1] for l in code_logits])
    leading, vocab_size = code_logits[0].shape[:-1], len(assignment)
    num_positions = math.prod(leading)
    check_size(vocab_size, scale)
    if blocks is None:
        kind = device.current().kind
        blocks = block_sizes(kind, sum(num_codes), num_positions, product_dtype)
    blocks = BlockSizes(*(tile.within(num_positions, vocab_size) for tile in blocks))
    padded_positions, padded_tokens = (
        up(size, math.lcm(*of_tiles))
        for size, of_tiles in (
            (num_positions, [tile.positions for tile in blocks]),
            (vocab_size, [tile.tokens for tile in blocks]),
        )
    )
    l_NxC = tpu_tiles.joined(code_logits, num_codes, padded_positions, product_dtype, _LOG2_E)
    tokens = tpu_tiles.tokens(assignment, scale, bias, padded_tokens, l_NxC, _LOG2_E)
    log2_z_N = _log2_z(_Static(num_codes, blocks, interpret), l_NxC, tokens)
    return (log2_z_N[:num_positions] / _LOG2_E).reshape(leading)


def top_k(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    k: int,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    tile: Tile | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.top_k`. Products are exact.

    Args:
        tile: None: one that fits vector memory.
        interpret: `pltpu.InterpretParams` to run on a CPU.

    Raises:
        NotSupported: more than 4096 code logits.
    """
    num_codes = tpu_tiles.padded_num_codes([l.shape[-1] for l in code_logits])
    leading, vocab_size = code_logits[0].shape[:-1], len(assignment)
    rows = tuple(l.reshape(-1, l.shape[-1]) for l in code_logits)
    num_positions = len(rows[0])
    tile = (tile or top_k_tile(sum(num_codes))).within(num_positions, vocab_size)
    l_NxC = tpu_tiles.joined(rows, num_codes, up(num_positions, tile.positions), jnp.float32)
    padded_size, of_group = up(vocab_size, tile.tokens), tile.tokens // LANES
    tokens = tpu_tiles.tokens(assignment, scale, bias, padded_size, l_NxC)
    # Tokens of a group side by side by id: of equal peaks, the first group has the lowest ids.
    tokens = jax.tree.map(
        lambda x: x.reshape(len(x), -1, LANES, of_group).swapaxes(2, 3).reshape(x.shape), tokens
    )
    static = _Static(num_codes, BlockSizes(tile, tile), interpret)
    peak_Nx1, sum_Nx1, of_groups_NxG = _pass(static, jnp.exp, l_NxC, tokens, with_groups=True)
    log_z_N = (peak_Nx1 + jnp.log(sum_Nx1))[:num_positions, 0]
    num_groups = min(k, of_groups_NxG.shape[1])
    groups_NxG = jax.lax.top_k(of_groups_NxG[:num_positions], num_groups)[1]

    def of_position(args: tuple[multi.CodeLogits, jax.Array]) -> tuple[jax.Array, jax.Array]:
        code_logits, groups_G = args
        ids_I = (groups_G[:, None] * of_group + jnp.arange(of_group)).reshape(-1)
        z_I = multi.listed_logits(
            code_logits, assignment, jnp.minimum(ids_I, vocab_size - 1), bias, scale
        )
        return first_of_sorted(jnp.where(ids_I < vocab_size, z_I, -jnp.inf), ids_I, k)

    z_Nxk, ids_Nxk = jax.lax.map(of_position, (rows, groups_NxG), batch_size=_LISTED_POSITIONS)
    return (
        z_Nxk.reshape(*leading, k),
        ids_Nxk.astype(jnp.int32).reshape(*leading, k),
        log_z_N.reshape(leading),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log2_z(static: _Static, l_NxC: jax.Array, tokens: Tokens) -> jax.Array:
    return _forward(static, l_NxC, tokens)[0]


def _forward(
    static: _Static, l_NxC: jax.Array, tokens: Tokens
) -> tuple[jax.Array, tuple[jax.Array, Tokens, jax.Array, jax.Array]]:
    peak_Nx1, sum_Nx1 = _pass(static, jnp.exp2, l_NxC, tokens)
    log2_z_N = (peak_Nx1 + jnp.log2(sum_Nx1))[:, 0]
    return log2_z_N, (l_NxC, tokens, peak_Nx1, sum_Nx1)


def _pass(
    static: _Static,
    exp: Callable[[jax.Array], jax.Array],
    l_NxC: jax.Array,
    tokens: Tokens,
    with_groups: bool = False,
) -> tuple[jax.Array, ...]:
    """Peak and sum of exponentials, float32 (N, 1) each; and the peaks of groups, (N, G).

    A group is what stands in the same lane of a tile: G = 128 V / T for tiles of T tokens.
    """
    num_positions, num_code_logits = l_NxC.shape
    p, t, _ = static.blocks.forward
    num_tiles = tokens.bias.shape[1] // t
    column = pl.BlockSpec((p, 1), lambda i, j: (i, 0))
    groups = pl.BlockSpec((p, LANES), lambda i, j: (i, j))
    outs = [(column, 1), (column, 1), *[(groups, num_tiles * LANES)] * with_groups]
    return pl.pallas_call(
        functools.partial(_forward_kernel, static, exp),
        grid=(num_positions // p, num_tiles),
        in_specs=[
            pl.BlockSpec((p, num_code_logits), lambda i, j: (i, 0)),
            tpu_tiles.token_specs(tokens, t, lambda i, j: (0, j)),
        ],
        out_specs=[spec for spec, _ in outs],
        out_shape=[out_shape((num_positions, width), jnp.float32, l_NxC) for _, width in outs],
        scratch_shapes=[pltpu.VMEM((p, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=static.interpret,
        name="vqcx_codebook_top_k" if with_groups else "vqcx_codebook_log_z_forward",
    )(l_NxC, tokens)


def _forward_kernel(
    static: _Static,
    exp: Callable[[jax.Array], jax.Array],
    l_ref: Any,
    tokens: Any,
    peak_ref: Any,
    sum_ref: Any,
    *refs: Any,
) -> None:
    *of_groups_ref, peaks_ref, sums_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        peaks_ref[...] = jnp.full_like(peaks_ref, _LOWEST)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    s_CxT = tpu_tiles.selection(tokens.codes, static.num_codes)
    for rows in static.blocks.forward.rows():
        z_RxT = tpu_tiles.logits(tokens, tpu_tiles.dot(l_ref[rows], s_CxT))
        lanes = [z_RxT[:, i : i + LANES] for i in range(0, z_RxT.shape[1], LANES)]
        of_groups = functools.reduce(jnp.maximum, lanes)
        for ref in of_groups_ref:
            ref[rows] = of_groups
        before = peaks_ref[rows]
        peaks = jnp.maximum(before, of_groups)
        sums = sums_ref[rows] * exp(before - peaks)
        sums_ref[rows] = functools.reduce(lambda s, z: s + exp(z - peaks), lanes, sums)
        peaks_ref[rows] = peaks

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        peaks = peaks_ref[...]
        peak = jnp.max(peaks, axis=1, keepdims=True)
        peak_ref[...] = peak
        sum_ref[...] = jnp.sum(sums_ref[...] * exp(peaks - peak), axis=1, keepdims=True)


def _backward(
    static: _Static, residuals: tuple[jax.Array, Tokens, jax.Array, jax.Array], g_N: jax.Array
) -> tuple[jax.Array, Tokens]:
    l_NxC, tokens, peak_Nx1, sum_Nx1 = residuals

    def of_rows(
        rows: slice, sums_RxT: jax.Array, tokens: Tokens, peak_ref: Any, weight_ref: Any
    ) -> tuple[jax.Array, jax.Array]:
        z_RxT = tpu_tiles.logits(tokens, sums_RxT)
        d_z_RxT = jnp.exp2(z_RxT - peak_ref[rows]) * weight_ref[rows]
        return d_z_RxT, d_z_RxT

    return gradients(
        of_rows,
        "vqcx_codebook_log_z_backward",
        static.blocks.backward,
        static.num_codes,
        l_NxC,
        tokens,
        [peak_Nx1, g_N[:, None] / sum_Nx1],
        static.interpret,
    )


_log2_z.defvjp(_forward, _backward)
