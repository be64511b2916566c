"""Pallas kernels for Hopper GPUs: token logits of a tile are one product with the matrix S.

S (V, C), C the code logits of all codebooks side by side, has a one at the code of each codebook,
so that
    z = scale (l S^T) + bias,   d l = (scale d z) S:
flash attention with l for queries and S for keys and values. S is made by XLA in bfloat16, exactly,
V C numbers where a full head has V D. Two warpgroups have 64 positions each and share the tiles of
S that a third one fetches. Powers of two as in `tpu`: l and bias come times log2 e.

Nothing with N V numbers is ever written.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from vqcx_jax.ops import device, gpu
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.codebook.streaming.gpu_block_sizes import BlockSizes, Tile, block_sizes, check
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.varying import varying_like

_LOG2_E = math.log2(math.e)
# Positions of a warpgroup, and warpgroups that compute; code logits come in multiples.
_ROWS, _WARPGROUPS, _CODES = 64, 2, 64
_MAX_CODES = 256
_GRID = ("rows", "part")


class _Static(NamedTuple):
    """Into how many parts the vocabulary is cut, and its tiles."""

    parts: int
    blocks: BlockSizes


class _Tokens(NamedTuple):
    """Of all tokens, padded to whole tiles with impossible ones."""

    s_VxC: jax.Array
    scale_V: jax.Array
    bias_V: jax.Array


def log_z(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    product_dtype: DTypeLike = "float32",
    blocks: BlockSizes | None = None,
) -> jax.Array:
    """See `api.log_z`.

    Args:
        blocks: None: those of the table for this device.

    Raises:
        UserError: blocks that no kernel can be made of.
        NotSupported: product_dtype is not bfloat16, more than 256 code logits, or no Hopper GPU.
    """
    gpu.require_hopper()
    if jnp.dtype(product_dtype) != jnp.bfloat16:
        raise NotSupported(f"product_dtype={jnp.dtype(product_dtype)}: must be bfloat16")
    num_codes = [l.shape[-1] for l in code_logits]
    padded_codes = pl.cdiv(sum(num_codes), _CODES) * _CODES
    if padded_codes > _MAX_CODES:
        raise NotSupported(f"{sum(num_codes)} code logits: at most {_MAX_CODES} are supported")
    leading = code_logits[0].shape[:-1]
    num_positions, block = math.prod(leading), _ROWS * _WARPGROUPS
    l_NxC = jnp.concatenate([l.reshape(-1, l.shape[-1]) for l in code_logits], axis=1)
    padding = (-num_positions % block, padded_codes - sum(num_codes))
    l_NxC = jnp.pad(_LOG2_E * l_NxC, [(0, n) for n in padding]).astype(jnp.bfloat16)
    if blocks is None:
        blocks = block_sizes(device.current().kind)
    check(blocks)
    multiple = math.lcm(*(tile.tokens for tile in blocks))
    static = _Static(_parts(len(l_NxC), len(assignment), multiple), blocks)
    tokens = _tokens(assignment, num_codes, padded_codes, multiple * static.parts, bias, scale)
    log2_z_N = _log2_z(static, l_NxC, jax.tree.map(lambda x: varying_like(x, l_NxC), tokens))
    return (log2_z_N[:num_positions] / _LOG2_E).reshape(leading)


def _tokens(
    assignment: jax.Array,
    num_codes: list[int],
    padded_codes: int,
    multiple: int,
    bias: jax.Array | None,
    scale: jax.Array | None,
) -> _Tokens:
    vocab_size = len(assignment)
    padding = -vocab_size % multiple
    columns = [
        jax.nn.one_hot(assignment[:, m], n, dtype=jnp.bfloat16) for m, n in enumerate(num_codes)
    ]
    s_VxC = jnp.concatenate(columns, axis=1)
    scale = jnp.ones((vocab_size,), jnp.float32) if scale is None else scale.astype(jnp.float32)
    bias = jnp.zeros((vocab_size,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    return _Tokens(
        jnp.pad(s_VxC, ((0, padding), (0, padded_codes - s_VxC.shape[1]))),
        jnp.pad(scale, (0, padding)),
        jnp.pad(_LOG2_E * bias, (0, padding), constant_values=-jnp.inf),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log2_z(static: _Static, l_NxC: jax.Array, tokens: _Tokens) -> jax.Array:
    return _forward(static, l_NxC, tokens)


def _log2_z_fwd(static: _Static, l_NxC: jax.Array, tokens: _Tokens) -> tuple[jax.Array, Any]:
    log2_z_N = _forward(static, l_NxC, tokens)
    return log2_z_N, (l_NxC, tokens, log2_z_N)


def _log2_z_bwd(static: _Static, residuals: Any, g_N: jax.Array) -> tuple[jax.Array, _Tokens]:
    l_NxC, tokens, log2_z_N = residuals
    d_l_NxC, d_scale_V, d_bias_V = _backward(static, l_NxC, tokens, log2_z_N, g_N)
    d_tokens = _Tokens(jnp.zeros_like(tokens.s_VxC), d_scale_V, d_bias_V)
    return d_l_NxC.astype(l_NxC.dtype), d_tokens


_log2_z.defvjp(_log2_z_fwd, _log2_z_bwd)


def _parts(num_rows: int, vocab_size: int, multiple: int) -> int:
    """Of so many tokens or more, as many as make work for a whole GPU."""
    wanted = max(1, 128 // (num_rows // (_ROWS * _WARPGROUPS)))
    return min(wanted, pl.cdiv(vocab_size, multiple))


def _forward(static: _Static, l_NxC: jax.Array, tokens: _Tokens) -> jax.Array:
    plgpu = gpu.pallas()
    num_rows, num_codes = l_NxC.shape
    tiles = _tiles(static.blocks.forward, static.parts, tokens)
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def body(
        l_ref: Any, s_ref: Any, scale_ref: Any, bias_ref: Any, peak_ref: Any, total_ref: Any,
        l_smem: Any, peak_smem: Any, total_smem: Any, barriers: Any,
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        row_block, part = (lax.axis_index(name) for name in _GRID)

        def compute(pipeline: Any) -> None:
            first_row = (row_block * _WARPGROUPS + warpgroup) * _ROWS
            rows = pl.ds(first_row, _ROWS)
            l_tile = l_smem.at[warpgroup]
            barrier = barriers.at[warpgroup]
            plgpu.copy_gmem_to_smem(l_ref.at[rows], l_tile, barrier)
            plgpu.barrier_wait(barrier)
            start = (
                plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), by_row)
                for value in (-jnp.inf, 0.0)
            )
            peak, total = pipeline(tuple(start))
            for value, smem, ref in (
                (peak, peak_smem.at[warpgroup], peak_ref),
                (total, total_smem.at[warpgroup], total_ref),
            ):
                smem[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, ref.at[part, rows])
            plgpu.wait_smem_to_gmem(0)

        def tile(index: Any, s_smem: Any, scale_smem: Any, bias_smem: Any, carry: Any) -> Any:
            peak, total = carry
            sums = _product(plgpu, l_smem.at[warpgroup], s_smem)
            z = _per_token(plgpu, scale_smem, sums) * sums + _per_token(plgpu, bias_smem, sums)
            new_peak = jnp.maximum(peak, z.max(axis=1))
            # Until a token that is not banned by bias = -inf comes, the peak is -inf.
            shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            e = jnp.exp2(z - lax.broadcast_in_dim(shift, z.shape, [0]))
            return new_peak, total * jnp.exp2(peak - shift) + e.sum(axis=1)

        _for_tiles(plgpu, tile, compute, tiles, part, (s_ref, scale_ref, bias_ref))

    row_smem = plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32)
    shape = jax.ShapeDtypeStruct((tiles.parts, num_rows), jnp.float32)
    scratch = [
        _tile_smem(plgpu, (_WARPGROUPS, _ROWS, num_codes)),
        row_smem,
        row_smem,
        plgpu.Barrier(num_barriers=_WARPGROUPS),
    ]
    results = _launch(plgpu, body, tiles, num_rows, [shape, shape], scratch)(l_NxC, *tokens)
    peak, total = (varying_like(x, l_NxC) for x in results)
    largest = jnp.max(peak, axis=0)
    shift = jnp.where(largest == -jnp.inf, 0.0, largest)
    return largest + jnp.log2(jnp.sum(total * jnp.exp2(peak - shift), axis=0))


def _backward(
    static: _Static, l_NxC: jax.Array, tokens: _Tokens, log2_z_N: jax.Array, g_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by l, and (V,) by scale and bias."""
    plgpu = gpu.pallas()
    num_rows, num_codes = l_NxC.shape
    tiles = _tiles(static.blocks.backward, static.parts, tokens)
    size = tiles.size
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def body(
        l_ref: Any, z_ref: Any, g_ref: Any, s_ref: Any, scale_ref: Any, bias_ref: Any,
        d_l_ref: Any, d_scale_ref: Any, d_bias_ref: Any,
        l_smem: Any, z_smem: Any, g_smem: Any, d_l_smem: Any, d_z_smem: Any,
        d_scale_smem: Any, d_bias_smem: Any, barriers: Any,
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        row_block, part = (lax.axis_index(name) for name in _GRID)
        row_part = row_block * _WARPGROUPS + warpgroup

        def compute(pipeline: Any) -> None:
            rows = pl.ds(row_part * _ROWS, _ROWS)
            for index, (ref, smem) in enumerate(
                ((l_ref, l_smem), (z_ref, z_smem), (g_ref, g_smem))
            ):
                barrier = barriers.at[3 * warpgroup + index]
                plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[warpgroup], barrier)
                plgpu.barrier_wait(barrier)

            def summed(accumulator: Any) -> jax.Array:
                pipeline(accumulator)
                return accumulator[...]

            d_l = pl.run_scoped(summed, plgpu.ACC((_ROWS, num_codes), jnp.float32))
            tile = d_l_smem.at[warpgroup]
            for first in range(0, num_codes, _CODES):
                columns = pl.ds(first, _CODES)
                tile[...] = d_l[:, first : first + _CODES]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, d_l_ref.at[part, rows, columns])
                plgpu.wait_smem_to_gmem(0)

        def tile(index: Any, s_smem: Any, scale_smem: Any, bias_smem: Any, d_l: Any) -> Any:
            sums = _product(plgpu, l_smem.at[warpgroup], s_smem)
            scale = _per_token(plgpu, scale_smem, sums)
            z = scale * sums + _per_token(plgpu, bias_smem, sums)
            log2_z, g = (
                lax.broadcast_in_dim(
                    plgpu.load(smem.at[warpgroup], layout=by_row, optimized=False), z.shape, [0]
                )
                for smem in (z_smem, g_smem)
            )
            d_z = g * jnp.exp2(z - log2_z)
            where = pl.ds((part * tiles.steps + index[0]) * size, size)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for value, smem in ((d_z * sums, d_scale_smem), (d_z, d_bias_smem)):
                smem.at[warpgroup][...] = value.sum(axis=0)
            narrow = d_z_smem.at[warpgroup]
            narrow[...] = (scale * d_z).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for smem, ref in ((d_scale_smem, d_scale_ref), (d_bias_smem, d_bias_ref)):
                plgpu.copy_smem_to_gmem(smem.at[warpgroup], ref.at[row_part, where])
            plgpu.wgmma(d_l, narrow, s_smem)
            plgpu.wgmma_wait(0)  # Before the tiles change.
            return d_l

        _for_tiles(plgpu, tile, compute, tiles, part, (s_ref, scale_ref, bias_ref))

    row_smem = plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32)
    token_smem = plgpu.SMEM((_WARPGROUPS, size), jnp.float32)
    per_token = jax.ShapeDtypeStruct((num_rows // _ROWS, len(tokens.bias_V)), jnp.float32)
    outputs = [
        jax.ShapeDtypeStruct((tiles.parts, num_rows, num_codes), jnp.float32),
        per_token,
        per_token,
    ]
    scratch = [
        _tile_smem(plgpu, (_WARPGROUPS, _ROWS, num_codes)),
        row_smem,
        row_smem,
        plgpu.SMEM((_WARPGROUPS, _ROWS, _CODES), jnp.float32),
        _tile_smem(plgpu, (_WARPGROUPS, _ROWS, size)),
        token_smem,
        token_smem,
        plgpu.Barrier(num_barriers=3 * _WARPGROUPS),
    ]
    launch = _launch(plgpu, body, tiles, num_rows, outputs, scratch)
    results = launch(l_NxC, log2_z_N, g_N, *tokens)
    d_l, d_scale, d_bias = (jnp.sum(varying_like(x, l_NxC), axis=0) for x in results)
    return d_l, d_scale, d_bias


# ---------------------------------------------------------------- within the kernels


class _Tiles(NamedTuple):
    """Tiles of `size` tokens, `steps` of them in each part, of which a block of threads has one.

    stages: of them that are in shared memory at a time.
    """

    size: int
    steps: int
    parts: int
    stages: int


def _tiles(tile: Tile, parts: int, tokens: _Tokens) -> _Tiles:
    steps = len(tokens.bias_V) // (tile.tokens * parts)
    return _Tiles(tile.tokens, steps, parts, tile.stages)


def _for_tiles(
    plgpu: Any, tile: Any, compute: Any, tiles: _Tiles, part: Any, token_refs: tuple[Any, ...]
) -> None:
    """`compute` on both warpgroups, with `tile` for each tile of a part, which a third fetches."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    num_codes = token_refs[0].shape[1]

    def block(step: Any) -> Any:
        return part * tiles.steps + step

    per_token = plgpu.BlockSpec((tiles.size,), lambda step: (block(step),))
    s_spec = plgpu.BlockSpec(
        (tiles.size, num_codes), lambda step: (block(step), 0), transforms=transforms
    )
    plgpu.emit_pipeline_warp_specialized(
        tile,
        grid=(tiles.steps,),
        in_specs=[s_spec, per_token, per_token],
        max_concurrent_steps=tiles.stages,
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=_WARPGROUPS,
        compute_context=compute,
    )(*token_refs)


def _launch(plgpu: Any, body: Any, tiles: _Tiles, num_rows: int, outputs: Any, scratch: Any) -> Any:
    """The kernel: a block of threads for each 128 positions and each part of the tokens."""
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=(num_rows // (_ROWS * _WARPGROUPS), tiles.parts),
        grid_names=_GRID,
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _tile_smem(plgpu: Any, shape: tuple[int, ...]) -> Any:
    """Of bfloat16, as matrix units read it."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _product(plgpu: Any, l_smem: Any, s_smem: Any) -> jax.Array:
    """Sums of code logits, float32 (64, tokens)."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, l_smem, s_smem.transpose((1, 0)))
        return accumulator[...]

    shape = (_ROWS, s_smem.shape[0])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _per_token(plgpu: Any, smem: Any, like: jax.Array) -> jax.Array:
    """What tokens have, for every position."""
    row = plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(row, like.shape, [1])
