"""The language-model loss of a batch of packed documents."""

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.nn.functional import Tree
from vqcx_jax.nn.transformer import Transformer
from vqcx_jax.ops.codebook.reassign import Statistics

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
    return _summed_nll(model, _hidden(model, batch), batch, z_loss)


def observed_nll(
    graphdef: nnx.GraphDef, params: Tree, buffers: Tree, batch: Batch, z_loss: float = 0.0
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Statistics | None]]:
    """`summed_nll` for training: its second result also has what the head observes.

    See `Head.observe`; None for heads that learn by gradients alone.
    """
    model = nnx.merge(graphdef, params, buffers)
    h_BxTxD = _hidden(model, batch)
    loss, (nll, tokens) = _summed_nll(model, h_BxTxD, batch, z_loss)
    observed = model.head.observe(h_BxTxD, batch["targets"], batch["segment_ids"] != 0)
    return loss, (nll, tokens, observed)


def _hidden(model: Transformer, batch: Batch) -> jax.Array:
    return model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"])


def _summed_nll(
    model: Transformer, h_BxTxD: jax.Array, batch: Batch, z_loss: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    is_token_BxT = batch["segment_ids"] != 0
    loss, nll = model.head.summed_nll(h_BxTxD, batch["targets"], is_token_BxT, z_loss)
    return loss, (nll, jnp.sum(is_token_BxT, dtype=jnp.float32))
