"""Tiles of the TPU kernels: the reviewed table, by JAX's device kind, and how they fit a length.

Rows of one document, heads up to 128 wide, on the chips that are named: the fewest cycles in the
schedules of those that
    python benchmarks/tune.py "attention, complex" --chips v5p v6e --results FILE.jsonl
has tried, for T = 8192 and 16 causal heads of 128 (docs/kernels.md). The same tiles were the best
for "attention, PoPE", whose queries and keys are twice as wide once they are turned. Rows of
several documents: likewise, with "attention, PoPE, packed". The others were tried by hand.
"""

import dataclasses
import math

from jax.experimental import pallas as pl

from vqcx_jax.errors import UserError
from vqcx_jax.ops.tpu import LANES, up


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Queries and keys of a tile, multiples of 128; capped by the sequence's length.

    Attributes:
        block_q, block_kv: of the forward pass.
        block_q_backward, block_kv_backward: of the backward pass.
        sub_q: queries that the forward pass works on at a time within a tile, which they divide.
        sub_kv_backward: keys that the backward pass works on at a time, likewise.
        cached_keys: keys, with values, that stay in VMEM in the forward pass, counted as bfloat16
            ones of width 128; longer sequences transform keys anew for each tile.
        chunk_keys: keys of width 128 that the backward pass holds in VMEM with their gradients;
            longer sequences go in chunks of as many.
    """

    block_q: int = 1024
    block_kv: int = 1024
    block_q_backward: int = 1024
    block_kv_backward: int = 1024
    sub_q: int = 256
    sub_kv_backward: int = 256
    cached_keys: int = 32768
    chunk_keys: int = 8192


def fit(blocks: BlockSizes, length: int) -> BlockSizes:
    """Block sizes for a sequence of this length, which is padded to a multiple of the largest.

    Raises:
        UserError: a size is not a multiple of 128, does not divide the largest, or is not a
            multiple of its part that is worked on at a time.
    """
    names = ("block_q", "block_kv", "block_q_backward", "block_kv_backward")
    asked = {name: getattr(blocks, name) for name in names}
    largest = max(asked.values())
    for name, size in asked.items():
        if size % LANES or size < 1:
            raise UserError(f"{name}={size}: must be a multiple of {LANES}")
        if largest % size:
            raise UserError(f"{name}={size}: must divide the largest block, {largest}")
    # As many of the largest as it takes, and no larger than that many need be; the others are equal
    # parts of it.
    lanes = pl.cdiv(pl.cdiv(length, pl.cdiv(length, largest)), LANES)
    parts = {name: pl.cdiv(lanes * LANES, size) for name, size in asked.items()}
    whole = up(lanes, math.lcm(*parts.values())) * LANES
    sizes = {name: whole // count for name, count in parts.items()}
    subs = {
        "sub_q": math.gcd(blocks.sub_q, sizes["block_q"]),
        "sub_kv_backward": math.gcd(blocks.sub_kv_backward, sizes["block_kv_backward"]),
    }
    for name, size in subs.items():
        if size % LANES:
            raise UserError(f"{name}={getattr(blocks, name)}: must be a multiple of {LANES}")
    return dataclasses.replace(blocks, **sizes, **subs)


_OTHERS = BlockSizes()
_V5P = BlockSizes(block_q=2048, block_kv=1024, block_kv_backward=2048)
_TABLE = {
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": BlockSizes(block_q=2048, block_kv=2048, block_kv_backward=2048),
}

# Smaller tiles leave out more of what other documents' tokens would be. On v6e they cost as
# much as they save.
_V5P_PACKED = BlockSizes(
    block_q=512, block_kv=512, block_q_backward=512, block_kv_backward=512, sub_kv_backward=128
)
_PACKED = {"TPU v5": _V5P_PACKED, "TPU v5p": _V5P_PACKED}


def block_sizes(device_kind: str, head_dim: int, is_packed: bool) -> BlockSizes:
    """Those for a device and the width of queries and keys as they come, or of values if larger.

    Args:
        is_packed: are there segment ids? Their tiles are not larger than the default, as more of
            a larger one is computed in vain.
    """
    if head_dim > 128:
        return _OTHERS
    return (_PACKED if is_packed else _TABLE).get(device_kind, _OTHERS)
