"""What the attention of a model has learned and what it attends to, as numbers."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqcx_jax.nn import Param, Transformer
from vqcx_jax.nn.attention.pope import PopeEncoding
from vqcx_jax.nn.attention.rotary import RotaryEncoding
from vqcx_jax.nn.transformer import Block
from vqcx_jax.ops import attention as ops


@dataclasses.dataclass(frozen=True)
class AttentionByDistance:
    """Attention weights of queries to the key that stands d tokens before them, d = 0 .. T-1.

    sums: float64 (L, H, T), the weights of all queries of the text, for each layer and head.
    pairs: int64 (T,), how many queries see a key at that distance.
    """

    sums: np.ndarray
    pairs: np.ndarray

    def means(self, firsts: np.ndarray) -> np.ndarray:
        """Mean weight of a pair, (L, H, N); NaN where there is none.

        Args:
            firsts: int (N,), rising from 0: distances, each the first of a bucket.
        """
        sums = np.add.reduceat(self.sums, firsts, axis=-1)
        pairs = np.add.reduceat(self.pairs, firsts)
        return np.divide(sums, pairs, where=pairs > 0, out=np.full_like(sums, np.nan))


def learned_arrays(model: Transformer) -> dict[str, np.ndarray]:
    """What the encoding of positions has, by name: layers in front, planes or coordinates last.

    Trained arrays as the model uses them, and the `frequencies` of encodings by rotation: those
    that are not trained have no layer axis. Empty for encodings that have neither.
    """
    encoding = model.blocks.attention.encoding
    arrays = nnx.to_pure_dict(nnx.state(encoding, Param))
    if isinstance(encoding, PopeEncoding):
        arrays["bias"] = ops.clamp_bias(arrays["bias"])
    if isinstance(encoding, RotaryEncoding):
        arrays["frequencies"] = encoding.frequencies()
    return {name: np.asarray(array) for name, array in arrays.items()}


def attention_by_distance(
    model: Transformer, batches: Iterable[dict[str, np.ndarray]]
) -> AttentionByDistance:
    """Sums the attention weights of a text.

    Args:
        model: of dtype float32, on one device: no mesh may be set.
        batches: one or more of packed rows, {inputs, segment_ids, positions}: int32 (B, T).
    """
    window = model.config.attention.window
    parts = [(_sums(model, batch), _pairs(batch, window)) for batch in batches]
    sums, pairs = zip(*parts, strict=True)
    return AttentionByDistance(np.asarray(sums, np.float64).sum(axis=0), np.sum(pairs, axis=0))


@jax.jit
def _sums(model: Transformer, batch: dict[str, jax.Array]) -> jax.Array:
    """`AttentionByDistance.sums` of one batch."""
    info = model.blocks.attention.encoding.info(batch["segment_ids"], batch["positions"])
    is_token_BxT = batch["segment_ids"] != 0

    def layer(x_BxTxD: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
        weights_BxHxTxT = block.attention.weights(block.attention_norm(x_BxTxD), info)
        weights_BxHxTxT *= is_token_BxT[:, None, :, None]
        x_BxTxD, _ = block(x_BxTxD, info)
        return x_BxTxD, jnp.sum(_by_distance(weights_BxHxTxT), axis=(0, 2))

    return jax.lax.scan(layer, model.embed(batch["inputs"]), model.blocks)[1]


def _by_distance(weights_BxHxTxT: jax.Array) -> jax.Array:
    """The key axis becomes one of distances; 0 where there is no such key."""
    index = jnp.arange(weights_BxHxTxT.shape[-1])
    key_TxT = index[:, None] - index
    keys = jnp.maximum(key_TxT, 0)[None, None]
    return jnp.where(key_TxT >= 0, jnp.take_along_axis(weights_BxHxTxT, keys, axis=-1), 0.0)


def _pairs(batch: dict[str, np.ndarray], window: int | None) -> np.ndarray:
    """A query sees as many keys as stand before it in its document, or in the window."""
    positions = batch["positions"][batch["segment_ids"] != 0]
    queries_at_T = np.bincount(positions, minlength=batch["positions"].shape[1])
    pairs_T = np.cumsum(queries_at_T[::-1])[::-1]
    return pairs_T if window is None else np.where(np.arange(len(pairs_T)) < window, pairs_T, 0)
