"""Heads of every kind, small, to be tested with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import oldest_jax

from vqcx_jax.nn import (
    AdaptiveHead,
    ClassVQHead,
    FullHead,
    Head,
    HuffmanHead,
    LowRankHead,
    MultiVQHead,
    TwoLevelHead,
    VQHead,
    functional,
)
from vqcx_jax.nn.heads import LearnedVQHead
from vqcx_jax.ops.codebook import classes
from vqcx_jax.ops.hierarchical import huffman_paths

ASSIGNMENT = jnp.asarray([0, 2, 2, 1, 0, 4, 4, 4, 1, 2, 0])  # Code 3 is empty.
COUNTS = np.asarray([50, 3, 9, 1, 0, 7, 7, 2, 0, 30, 4])
RANKS = np.argsort(np.argsort(-COUNTS, kind="stable")).astype(np.int32)
CAP = 1.5  # Products reach 4 and more.
# Kinds with a cap, and those whose logits are log-probabilities.
CAPPED = ("vq", "full", "streamed", "low_rank")
NORMALIZED = ("adaptive", "two_level", "huffman", "class_vq")
KINDS = CAPPED + NORMALIZED
# Of several codebooks. More of them is tested in test_multi_vq.py and test_learned_vq.py.
SEVERAL = ("two_codebooks", "own_and_product", "learned")
KINDS_AND_SEVERAL = [*KINDS, *(pytest.param(kind, marks=oldest_jax) for kind in SEVERAL)]
WITH_EVERY_JAX = ("vq", "class_vq", "full")
KINDS_AND_CAPS = [(kind, None) for kind in KINDS] + [(kind, CAP) for kind in CAPPED]


def new_head(
    kind: str,
    vocab_size: int = 11,
    token_bias: bool = True,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Head:
    """A head of width 8 with its initial values."""
    options["rngs"] = nnx.Rngs(0)
    if kind in CAPPED:
        options |= {"token_bias": token_bias, "dtype": dtype}
    ranks, counts = (np.resize(RANKS, vocab_size), np.resize(COUNTS, vocab_size))
    if vocab_size > len(RANKS):
        ranks = np.arange(vocab_size)[::-1]
    match kind:
        case "vq":
            return VQHead(jnp.resize(ASSIGNMENT, vocab_size), 5, 8, **options)
        case "full":
            return FullHead(vocab_size, 8, **options)
        case "streamed":
            return FullHead(vocab_size, 8, implementation="streamed", **options)
        case "low_rank":
            return LowRankHead(vocab_size, 8, 6, **options)
        case "adaptive":
            options |= {"div_value": 2.0, "dtype": dtype, "frequency_rank": ranks}
            return AdaptiveHead(vocab_size, 8, (3, 7), head_bias=token_bias, **options)
        case "two_level":
            return TwoLevelHead(vocab_size, 8, bias=token_bias, frequency_rank=ranks, **options)
        case "huffman":
            return HuffmanHead(jnp.asarray(huffman_paths(counts)), 8, bias=token_bias, **options)
        case "class_vq":
            tokens = classes.arrange(np.arange(vocab_size) % 4 - 1, 3)  # 0, 4 and 8 are frequent.
            codes = jnp.stack([jnp.resize(ASSIGNMENT, vocab_size + 3)] * 2, axis=1).at[:, 1].add(-1)
            codes %= 5
            options |= {"token_bias": token_bias, "token_scale": True, "dtype": dtype}
            return ClassVQHead(tokens, codes, 5, 8, **options)
        case "two_codebooks":
            return MultiVQHead(codes_of(vocab_size, 2), 5, 8, **options)
        case "own_and_product":
            options |= {"form": "product", "own_tokens": jnp.asarray([1, 6]), "token_scale": True}
            return MultiVQHead(codes_of(vocab_size, 4), 5, 8, **options)
        case "learned":
            options |= {"form": "product", "num_candidates": 3}
            return LearnedVQHead(codes_of(vocab_size, 4), 5, 8, **options)
    raise ValueError(kind)


def codes_of(vocab_size: int, num_codebooks: int) -> jax.Array:
    token, codebook = jnp.arange(vocab_size)[:, None], jnp.arange(num_codebooks)
    return (jnp.resize(ASSIGNMENT, vocab_size)[:, None] + token * codebook) % 5


def with_cap(kind: str, cap: float | None) -> dict[str, Any]:
    return {"logit_soft_cap": cap} if kind in CAPPED else {}


def make_head(kind: str, token_bias: bool, dtype: Any = jnp.float32, **options: Any) -> Head:
    """A head whose every parameter is random, biases too."""
    graphdef, params, buffers = functional.split(new_head(kind, 11, token_bias, dtype, **options))
    rng = np.random.default_rng(4)
    params = jax.tree.map(
        lambda p: jnp.asarray(0.7 * rng.standard_normal(p.shape), p.dtype), params
    )
    return nnx.merge(graphdef, params, buffers)


@jax.jit
def nll_and_gradient(head: Head, h: jax.Array, targets: jax.Array) -> Any:
    graphdef, params, buffers = functional.split(head)

    def loss(params: Any, h: jax.Array) -> tuple[jax.Array, Any]:
        nll, log_z = nnx.merge(graphdef, params, buffers).nll(h, targets)
        return (nll + 0.1 * log_z**2).sum(), (nll, log_z)

    gradients, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, h)
    return outputs, gradients
