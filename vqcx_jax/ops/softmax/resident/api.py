"""The summed loss of a softmax of few rows, by the implementation that suits the device."""

import functools

import jax

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.checks import check_shape, check_targets
from vqcx_jax.ops.labels import nan_if_counted
from vqcx_jax.ops.softmax.resident import tpu, xla


def summed_nll(
    h: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    bias: jax.Array | None = None,
    z_loss: float | jax.Array = 0.0,
    *,
    cap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of nll + z_loss log(Z)^2, and of nll, over the positions that count.

    nll and log Z are those of `full.nll`. Under `shard_map` the sums are of each device's own
    positions.

    Args:
        h: (..., D). weights: (R, D) of the same dtype. targets: int (...), values in [0, R).
        counts: bool (...), which positions count.
        bias: float32 (R,), -inf for rows that are none; or None.
        z_loss: coefficient of log(Z)^2.
        cap: soft-cap of weights . h, see `ops.soft_cap`; None: as it is.
        implementation: "xla", "pallas_tpu", or None: the kernel on TPUs.

    Returns:
        loss, nll: float32 (). nll is there to be reported; its gradient is zero.

    Raises:
        UserError: the implementation that was named cannot run; targets or counts are not one for
            each h; where they are known, targets out of range (under jit, and if they count, sums
            are NaN).
    """
    check_targets(targets, weights.shape[0], h.shape[:-1])
    check_shape("counts", counts, targets.shape)
    args = (h, weights, targets, counts, bias, z_loss)
    implementations = {
        dispatch.XLA: functools.partial(xla.summed_nll, *args, cap=cap),
        dispatch.PALLAS_TPU: functools.partial(tpu.summed_nll, *args, cap=cap),
    }
    loss, nll = dispatch.run("softmax.resident.summed_nll", implementations, implementation)
    invalid = nan_if_counted(targets, counts, weights.shape[0])
    return loss + invalid, nll + invalid
