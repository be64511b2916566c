"""The language-model loss of a batch of packed documents."""

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.nn.functional import Tree

Batch = dict[str, jax.Array]


def summed_nll(
    graphdef: nnx.GraphDef,
    params: Tree,
    buffers: Tree,
    batch: Batch,
    z_loss: float = 0.0,
    *,
    deterministic: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Summed loss over the tokens of a batch; padding (segment 0) does not count.

    Args:
        batch: inputs, targets, segment_ids, positions: int32 (B, T).
        z_loss: coefficient of log(Z)^2.
        deterministic: without the noise that a model may train with.

    Returns:
        sum of nll + z_loss log(Z)^2, and (sum of nll, number of tokens), float32 ().
    """
    model = nnx.merge(graphdef, params, buffers)
    if deterministic:
        model.eval()
    h_BxTxD = model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"])
    nll_BxT, log_z_BxT = model.head.nll(h_BxTxD, batch["targets"])
    is_token_BxT = batch["segment_ids"] != 0
    nll = jnp.sum(jnp.where(is_token_BxT, nll_BxT, 0.0))
    z_term = z_loss * jnp.sum(jnp.where(is_token_BxT, log_z_BxT**2, 0.0))
    return nll + z_term, (nll, jnp.sum(is_token_BxT, dtype=jnp.float32))
