"""Tiles of the TPU kernels, by chip: the fewest bundles of those tried (docs/kernels.md)."""

from typing import NamedTuple

from vqcx_jax.ops.codebook.tpu_tiles import Tile


class BlockSizes(NamedTuple):
    """Attributes: tiles of the forward and of the backward kernel."""

    forward: Tile
    backward: Tile


_DEFAULT = BlockSizes(Tile(1024, 512, 1024), Tile(1024, 1024, 1024))
_V5P = BlockSizes(Tile(1024, 1024, 256), Tile(1024, 1024, 1024))
_TABLE = {"TPU v5": _V5P, "TPU v5p": _V5P}  # By JAX's device kind.
# A tile of S for thousands of codes is as large as that of the logits.
_MANY_CODES = BlockSizes(Tile(256, 512, 256), Tile(256, 512, 256))


def block_sizes(device_kind: str, num_code_logits: int) -> BlockSizes:
    """Those for a device and a sum of K_m."""
    return _MANY_CODES if num_code_logits > 1024 else _TABLE.get(device_kind, _DEFAULT)
