"""Loss of a model over a split, and the three ways to say it."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.functional import Tree
from vqcx_jax.nn.loss import nll_by_position
from vqcx_jax.sharding import named_sharding

EvalStep = Callable[[Tree, Tree, dict[str, jax.Array], np.ndarray], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class SplitLoss:
    """Summed negative log-likelihood in nats, over `tokens` predicted tokens.

    by_position: its parts by position within the document, those that have tokens.
    """

    nll: float
    tokens: int
    by_position: tuple["PositionLoss", ...] = ()

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


@dataclasses.dataclass(frozen=True)
class PositionLoss:
    """The loss at positions `first` to `last`, counted from the beginning of the document.

    Where the end of a row cuts a document, its rest begins again at 0, for the model as well.
    """

    first: int
    last: int
    loss: SplitLoss


def _exp(x: float) -> float:
    return math.exp(x) if x < math.log(sys.float_info.max) else math.inf


def make_eval_step(graphdef: nnx.GraphDef) -> EvalStep:
    """`nll_by_position` of a model, jitted: (params, buffers, batch, bounds) -> (nll, tokens)."""
    return jax.jit(partial(nll_by_position, graphdef))


def doubling_bounds(middle: int, end: int) -> list[int]:
    """`middle` halved down to 1 and doubled as long as it is less than `end`, rising."""
    halved = [middle >> i for i in range(middle.bit_length())]
    doubled = (middle << i for i in range(1, end.bit_length()))
    return [bound for bound in (*reversed(halved), *doubled) if bound < end]


def split_loss(
    eval_step: EvalStep,
    params: Tree,
    buffers: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    *,
    bounds: Sequence[int] = (),
    max_batches: int | None = None,
) -> SplitLoss:
    """Sums the loss over batches.

    Args:
        eval_step: from `make_eval_step`.
        batches: global batches, the same on every process, rows padded with segment 0.
        bounds: rising positions, each the first of another bucket in `by_position`.
        max_batches: stop after this many; None: all.
    """
    sharding = named_sharding(mesh, ("batch", None), rules)
    nll_N, tokens_N = np.zeros(len(bounds) + 1), np.zeros(len(bounds) + 1, np.int64)
    last_position = 0
    for index, batch in enumerate(batches):
        if index == max_batches:
            break
        arrays: dict[str, jax.Array] = {
            name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
            for name, rows in batch.items()
        }
        batch_nll_N, batch_tokens_N = eval_step(
            params, buffers, arrays, np.asarray(bounds, np.int32)
        )
        nll_N += np.asarray(batch_nll_N)
        tokens_N += np.asarray(batch_tokens_N)
        last_position = max(last_position, int(batch["positions"].max()))
    firsts, lasts = (0, *bounds), (*(bound - 1 for bound in bounds), last_position)
    by_position = tuple(
        PositionLoss(first, last, SplitLoss(float(nll), int(tokens)))
        for first, last, nll, tokens in zip(firsts, lasts, nll_N, tokens_N, strict=True)
        if tokens
    )
    return SplitLoss(float(nll_N.sum()), int(tokens_N.sum()), by_position)
