"""Loss of a model over a split, and the three ways to say it."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial

import jax
import numpy as np
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.functional import Tree
from vqcx_jax.nn.loss import summed_nll
from vqcx_jax.sharding import named_sharding

EvalStep = Callable[
    [Tree, Tree, dict[str, jax.Array]], tuple[jax.Array, tuple[jax.Array, jax.Array]]
]


@dataclasses.dataclass(frozen=True)
class SplitLoss:
    """Summed negative log-likelihood in nats, over `tokens` predicted tokens."""

    nll: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Mean loss in nats."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss per token: depends on the tokenizer."""
        return _exp(self.per_token)

    def word_perplexity(self, words: int) -> float:
        """Exp of the loss per white-space word: comparable between tokenizers."""
        return _exp(self.nll / words)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits per UTF-8 byte of the text: comparable between tokenizers and languages."""
        return self.nll / math.log(2) / num_bytes


def _exp(x: float) -> float:
    return math.exp(x) if x < math.log(sys.float_info.max) else math.inf


def make_eval_step(graphdef: nnx.GraphDef) -> EvalStep:
    """`summed_nll` of a model, jitted: (params, buffers, batch) -> (nll, (nll, tokens))."""
    return jax.jit(partial(summed_nll, graphdef, deterministic=True))


def split_loss(
    eval_step: EvalStep,
    params: Tree,
    buffers: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    *,
    max_batches: int | None = None,
) -> SplitLoss:
    """Sums the loss over batches.

    Args:
        eval_step: from `make_eval_step`.
        batches: global batches, the same on every process, rows padded with segment 0.
        max_batches: stop after this many; None: all.
    """
    sharding = named_sharding(mesh, ("batch", None), rules)
    nll, tokens = 0.0, 0
    for index, batch in enumerate(batches):
        if index == max_batches:
            break
        arrays: dict[str, jax.Array] = {
            name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
            for name, rows in batch.items()
        }
        _, (batch_nll, batch_tokens) = eval_step(params, buffers, arrays)
        nll += float(batch_nll)
        tokens += int(batch_tokens)
    return SplitLoss(nll, tokens)
