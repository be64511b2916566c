"""Which block sizes of which kernels are tried."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from candidates import Sizes, nearest_first
from schedules import cases

PARTS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A case whose block sizes can be chosen.

    Attributes:
        names: of the sizes of one part.
        today: (chip, part) -> sizes of the reviewed table.
        blocks: (chip, part, sizes) -> block sizes of both parts, the other one's as they are.
        fits: (part, sizes) -> are they worth compiling?
        choices: of each size.
    """

    names: Sequence[str]
    today: Callable[[str, str], Sizes]
    blocks: Callable[[str, str, Sizes], Any]
    fits: Callable[[str, Sizes], bool]
    choices: Sequence[Sequence[int]]

    def candidates(self, chip: str, part: str) -> list[Sizes]:
        """Today's sizes and those that fit, in the order of how far they are from today's."""
        today = self.today(chip, part)
        fitting = [s for s in itertools.product(*self.choices) if self.fits(part, s)]
        return nearest_first({today, *fitting}, today)


def _streamed(product_dtype: str) -> Tuned:
    from vqcx_jax.ops.codebook.streaming.block_sizes import BlockSizes, block_sizes
    from vqcx_jax.ops.codebook.tpu_tiles import Tile

    def of(chip: str) -> BlockSizes:
        return block_sizes(cases.KINDS[chip], 256, cases.N, product_dtype)

    def blocks(chip: str, part: str, sizes: Sizes) -> BlockSizes:
        return of(chip)._replace(**{part: Tile(*sizes)})

    def fits(part: str, sizes: Sizes) -> bool:
        positions, tokens, rows = sizes
        # Logits that are held, float32: from 1 to 4 MB.
        return positions % rows == 0 and 2**18 <= rows * tokens <= 2**20

    choices = ((1024, 2048, 4096), (512, 1024, 2048), (256, 512, 1024))
    names = ("positions", "tokens", "row_block")
    return Tuned(names, lambda chip, part: tuple(getattr(of(chip), part)), blocks, fits, choices)


def _attention(head_dim: int, is_packed: bool = False) -> Tuned:
    """The table has one row for all kinds up to 128: the default's, if they disagree."""
    from vqcx_jax.ops.flash_attention.block_sizes import BlockSizes, block_sizes

    fields = {
        "forward": ("block_q", "block_kv", "sub_q"),
        "backward": ("block_q_backward", "block_kv_backward", "sub_kv_backward"),
    }

    def of(chip: str) -> BlockSizes:
        return block_sizes(cases.KINDS[chip], head_dim, is_packed=is_packed)

    def today(chip: str, part: str) -> Sizes:
        return tuple(getattr(of(chip), name) for name in fields[part])

    def blocks(chip: str, part: str, sizes: Sizes) -> BlockSizes:
        return dataclasses.replace(of(chip), **dict(zip(fields[part], sizes, strict=True)))

    def fits(part: str, sizes: Sizes) -> bool:
        block_q, block_kv, sub = sizes
        whole, held = (block_q, block_kv) if part == "forward" else (block_kv, block_q)
        # Scores that are worked on at a time, float32: from 0.5 to 4 MB.
        least = 2**15 if is_packed else 2**17
        return sub <= whole and least <= sub * held <= 2**20 and block_q * block_kv <= 2**22

    choices = ((512, 1024, 2048), (512, 1024, 2048, 4096), (128, 256, 512))
    if is_packed:  # Small ones leave out more of what other documents' tokens would be.
        choices = ((256, 512, 1024), (256, 512, 1024), (128, 256, 512))
    return Tuned(("block_q", "block_kv", "sub"), today, blocks, fits, choices)


TUNED = {
    "log_z 16x16": _streamed("bfloat16"),
    "log_z 16x16, float32": _streamed("float32"),
    "attention, complex": _attention(cases.HEAD_DIM),
    "attention, complex, width 64": _attention(64),
    "attention, PoPE": _attention(cases.HEAD_DIM),
    "attention, PoPE, width 64": _attention(64),
    "attention, PoPE, packed": _attention(cases.HEAD_DIM, is_packed=True),
    "attention, PoPE, width 64, packed": _attention(64, is_packed=True),
}
