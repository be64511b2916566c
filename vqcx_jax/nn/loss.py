"""The language-model loss of a batch of packed documents."""

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.nn.functional import Tree
from vqcx_jax.nn.transformer import Transformer
from vqcx_jax.ops.codebook.reassign import Statistics
from vqcx_jax.ops.labels import IGNORE_ID
from vqcx_jax.sharding import constrain

Batch = dict[str, jax.Array]


def summed_nll(
    graphdef: nnx.GraphDef, params: Tree, buffers: Tree, batch: Batch, z_loss: float = 0.0
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Summed loss over the tokens of a batch; padding (segment 0) and `IGNORE_ID` do not count.

    Args:
        batch: inputs, targets, segment_ids, positions: int32 (B, T).
        z_loss: coefficient of log(Z)^2.

    Returns:
        sum of nll + z_loss log(Z)^2, and (sum of nll, number of tokens), float32 ().
    """
    model = nnx.merge(graphdef, params, buffers)
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
    observed = model.head.observe(h_BxTxD, batch["targets"], _is_token(batch))
    return loss, (nll, tokens, observed)


def nll_by_position(
    graphdef: nnx.GraphDef, params: Tree, buffers: Tree, batch: Batch, bounds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Summed nll by position within the document; without the noise that a model may train with.

    Args:
        batch: as in `summed_nll`.
        bounds: int (N,), rising. They cut positions into N + 1 buckets: 0 .. bounds[0] - 1, and
            so on, the last from bounds[N - 1] on.

    Returns:
        nll: float32 (N + 1,), its sum over the tokens of each bucket. tokens: int32 (N + 1,).
    """
    model = nnx.merge(graphdef, params, buffers)
    model.eval()
    nll_BxT, _ = model.head.nll(_hidden(model, batch), batch["targets"])
    bucket_BxT = jnp.sum(batch["positions"] >= bounds[:, None, None], axis=0)
    bucket_BxT = jnp.where(_is_token(batch), bucket_BxT, -1)
    is_in_NxBxT = bucket_BxT == jnp.arange(len(bounds) + 1)[:, None, None]
    # A comparison and not a scatter: it is sharded as rows are, and fused into the sums.
    nll_N = jnp.sum(jnp.where(is_in_NxBxT, nll_BxT, 0.0), axis=(1, 2))
    tokens_N = jnp.sum(is_in_NxBxT, axis=(1, 2), dtype=jnp.int32)
    return constrain(nll_N, (None,), model.rules), constrain(tokens_N, (None,), model.rules)


def _is_token(batch: Batch) -> jax.Array:
    """Positions whose target counts."""
    return (batch["segment_ids"] != 0) & (batch["targets"] != IGNORE_ID)


def _hidden(model: Transformer, batch: Batch) -> jax.Array:
    return model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"])


def _summed_nll(
    model: Transformer, h_BxTxD: jax.Array, batch: Batch, z_loss: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    is_token_BxT = _is_token(batch)
    loss, nll = model.head.summed_nll(h_BxTxD, batch["targets"], is_token_BxT, z_loss)
    return loss, (nll, jnp.sum(is_token_BxT, dtype=jnp.float32))
