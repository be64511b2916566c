"""What of raw queries and keys counts where their phases do not."""

from typing import Literal, get_args

import jax

from vqcx_jax.errors import UserError

# "modulus": of each plane's complex number, made smooth (complex attention with delta = 0).
# "softplus": of each coordinate, which is a plane of its own (PoPE).
Amplitude = Literal["modulus", "softplus"]


def num_planes(width: int, amplitude: Amplitude | None) -> int:
    """P of a head of this width; turned queries and keys are 2 P wide."""
    return width if amplitude == "softplus" else width // 2


def check(amplitude: Amplitude | None, delta: jax.Array | None) -> None:
    """Raises a UserError for an unknown amplitude, and one that makes delta meaningless."""
    if amplitude not in (None, *get_args(Amplitude)):
        raise UserError(f"amplitude={amplitude!r}: must be None or one of {get_args(Amplitude)}")
    if amplitude is not None and delta is not None:
        raise UserError(f"delta: must be None for amplitude={amplitude!r}, which leaves phases out")
