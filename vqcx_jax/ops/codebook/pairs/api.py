"""The summed loss of two codebooks, by the implementation that suits the device."""

import functools

import jax

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.checks import check_shape
from vqcx_jax.ops.codebook.multi import Form
from vqcx_jax.ops.codebook.pairs import tpu, xla


def summed_nll(
    h: jax.Array,
    codebooks: tuple[jax.Array, jax.Array],
    log_mass: jax.Array,
    codes: tuple[jax.Array, jax.Array],
    counts: jax.Array,
    z_loss: float | jax.Array = 0.0,
    *,
    form: Form = "additive",
    cap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of nll + z_loss log(Z)^2, and of nll, over the positions that count.

    nll = log Z - l1[i] - l2[j] of the target's codes (i, j), with log Z of `bilinear.log_z`; biases
    of targets are left to the caller. Under `shard_map` the sums are of each device's own
    positions.

    Args:
        h: (..., D). codebooks: (K1, D1) and (K2, D2) of the same dtype; D1 = D2 = D, or
            D1 + D2 = D with product codes, see `multi`.
        log_mass: float32 (K1, K2), from `bilinear.cell_log_mass`.
        codes: int (...) and int (...), of the targets, in [0, K1) and [0, K2).
        counts: bool (...), which positions count.
        z_loss: coefficient of log(Z)^2.
        cap: soft-cap of the code logits of each codebook, see `ops.soft_cap`; None: as they are.
        implementation: "xla", "pallas_tpu", or None: the kernel on TPUs.

    Returns:
        loss, nll: float32 (). nll is there to be reported; its gradient is zero.

    Raises:
        UserError: the implementation that was named cannot run, codebooks that do not fit, or
            codes or counts that are not one for each h.
    """
    for name, x in (*(("codes", x) for x in codes), ("counts", counts)):
        check_shape(name, x, h.shape[:-1])
    args = (h, codebooks, log_mass, codes, counts, z_loss)
    implementations = {
        dispatch.XLA: functools.partial(xla.summed_nll, *args, form=form, cap=cap),
        dispatch.PALLAS_TPU: functools.partial(tpu.summed_nll, *args, form=form, cap=cap),
    }
    return dispatch.run("codebook.pairs.summed_nll", implementations, implementation)
