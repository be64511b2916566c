"""Tiles of the TPU kernels: the reviewed table, by the number of code logits and JAX's device kind.

Up to 256 code logits, on the chips that are named: the fewest cycles in the schedules of those that
    python benchmarks/tune.py "log_z 16x16" --chips v5p v6e --results FILE.jsonl
tries, for N = 8192 and V = 128,256 (docs/kernels.md). The others were tried by hand.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from vqcx_jax.ops.codebook.tpu_tiles import Tile
from vqcx_jax.ops.tpu import num_cores, up


class BlockSizes(NamedTuple):
    """Attributes: tiles of the forward and of the backward kernel, of as many positions."""

    forward: Tile
    backward: Tile


_V5P = BlockSizes(Tile(4096, 1024, 512), Tile(4096, 1024, 1024))
_V6E = BlockSizes(Tile(4096, 512, 1024), Tile(4096, 1024, 1024))
_V5P_MORE = BlockSizes(Tile(1024, 1024, 256), Tile(1024, 1024, 1024))
_OTHERS = BlockSizes(Tile(1024, 512, 1024), Tile(1024, 1024, 1024))
# A tile of S for thousands of codes is as large as that of the logits.
_MANY_CODES = BlockSizes(Tile(256, 512, 256), Tile(256, 512, 256))
# Up to so many code logits. The more there are, the fewer positions fit vector memory.
_TABLE: dict[int, dict[str, BlockSizes]] = {
    256: {"TPU v5": _V5P, "TPU v5p": _V5P, "TPU v6 lite": _V6E},
    1024: {"TPU v5": _V5P_MORE, "TPU v5p": _V5P_MORE},
    4096: {},
}
# Float32 products are three: on v5p the backward kernel has 7% more cycles with the large tiles.
_FLOAT32_UP_TO_256 = _TABLE[256] | _TABLE[1024]
_OF_OTHER_KINDS = {256: _OTHERS, 1024: _OTHERS, 4096: _MANY_CODES}


def block_sizes(
    device_kind: str, num_code_logits: int, num_positions: int, product_dtype: DTypeLike
) -> BlockSizes:
    """Those for a device, a sum of K_m, at most 4096, and N.

    As few positions are added as can be, so that cores have the same number of tiles.
    """
    most = next(bucket for bucket in _TABLE if num_code_logits <= bucket)
    is_exact = most == 256 and jnp.dtype(product_dtype) == jnp.float32
    blocks = (_FLOAT32_UP_TO_256 if is_exact else _TABLE[most]).get(
        device_kind, _OF_OTHER_KINDS[most]
    )
    step = max(tile.row_block for tile in blocks)
    largest = min(blocks.forward.positions, max(num_positions, step))
    sizes = range(step, largest + 1, step)
    cores = num_cores(device_kind)
    positions = min(sizes, key=lambda size: (up(num_positions, cores * size), -size))
    return BlockSizes(*(tile._replace(positions=positions) for tile in blocks))


def top_k_tile(num_code_logits: int) -> Tile:
    """For `tpu.top_k`, by hand: tokens of a group are tokens over 128, here 16 or fewer."""
    if num_code_logits <= 256:
        return Tile(256, 2048, 256)
    return Tile(256, 1024, 256) if num_code_logits <= 1024 else Tile(256, 512, 256)
