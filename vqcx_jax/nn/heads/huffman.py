"""Hierarchical softmax on a Huffman tree as an output layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.heads.normalized import NormalizedHead, whole
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops.checks import check_positive
from vqcx_jax.ops.hierarchical import huffman


class _Arrays(NamedTuple):
    nodes: jax.Array
    paths: jax.Array
    bias: jax.Array | None


class HuffmanHead(NormalizedHead):
    """A product of sigmoids along the path to a token (Mikolov et al. 2013).

    Args:
        paths: int (V, L), see `ops.hierarchical.huffman_paths`.
        bias: one for each of the V - 1 inner nodes.

    Raises:
        UserError: paths that are those of no tree of V tokens, or a width that is not positive.
    """

    def __init__(
        self,
        paths: jax.Array,
        dim: int,
        *,
        bias: bool = True,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        self.vocab_size = paths.shape[0]
        num_nodes = self.vocab_size - 1
        check_positive(dim=dim)
        huffman.check_paths(paths)
        nodes = 0.02 * jax.random.normal(rngs.params(), (num_nodes, dim), jnp.float32)
        self.nodes = param(nodes, (None, "embed"))
        if bias:
            self.bias = param(jnp.zeros((num_nodes,), jnp.float32), (None,), decay=False)
        self.paths = buffer(jnp.asarray(paths, jnp.int32), (None, None))
        self.has_bias = bias
        self.rules = rules or ShardingRules()

    def _arrays(self) -> _Arrays:
        bias = self.bias[...] if self.has_bias else None
        return _Arrays(whole(self.nodes, self.rules), self.paths[...], bias)

    def _nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array, arrays: _Arrays) -> jax.Array:
        return huffman.nll(h_BxTxD, arrays.nodes, arrays.paths, tokens_BxT, arrays.bias)

    def _log_probs(self, h_BxTxD: jax.Array, arrays: _Arrays) -> jax.Array:
        return huffman.log_probs(h_BxTxD, *arrays)
