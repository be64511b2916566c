"""What must hold of the arguments of operations, checked where shapes or values are known."""

import jax
import numpy as np

from vqcx_jax.errors import UserError


def are_known(x: jax.Array | np.ndarray | float) -> bool:
    """Whether x has values already, as it has outside of jit."""
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def check_shape(name: str, x: jax.Array | np.ndarray | None, shape: tuple[int, ...]) -> None:
    """Raises UserError unless x is None or has this shape."""
    if x is not None and x.shape != shape:
        raise UserError(f"{name} has shape {x.shape}; it must be {shape}")


def check_positive(**sizes: int) -> None:
    """Raises UserError, with the name, for a size that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size}: must be at least 1")


def check_width(h: jax.Array, rows: jax.Array) -> None:
    """Raises UserError unless hidden states (..., D) have the width of rows (..., D)."""
    if h.shape[-1] != rows.shape[-1]:
        raise UserError(f"h has width {h.shape[-1]}; it must be {rows.shape[-1]}, as wide as rows")


def check_per_token(name: str, x: jax.Array | None, vocab_size: int) -> None:
    """Raises UserError unless x is None or has one value a token, (vocab_size,)."""
    if x is not None and x.shape != (vocab_size,):
        raise UserError(
            f"{name} has shape {x.shape}; it must have one value a token, ({vocab_size},)"
        )


def check_targets(
    targets: jax.Array | np.ndarray,
    vocab_size: int,
    shape: tuple[int, ...],
    name: str = "targets",
) -> None:
    """Raises UserError unless targets are integers of this shape, that of the hidden states but D.

    So it does where values are known and not in [0, vocab_size); under jit losses of such targets
    are NaN, see `ops.labels.nan_unless_tokens`. Operations take tokens alone; labels that are to be
    ignored are for heads, or for `ops.labels.check_labels`.
    """
    check_shape(name, targets, shape)
    if not np.issubdtype(targets.dtype, np.integer):
        raise UserError(f"{name} have dtype {targets.dtype}; they must be integers")
    check_range(name, targets, vocab_size)


def check_range(name: str, x: jax.Array | np.ndarray, stop: int) -> None:
    """Raises UserError if numbers that are known are not in [0, stop)."""
    if not are_known(x):
        return
    values = np.asarray(x)
    wrong = values[(values < 0) | (values >= stop)]
    if wrong.size:
        raise UserError(f"{name} hold {wrong[0]}: must be in 0 .. {stop - 1}")
