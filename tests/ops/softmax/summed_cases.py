"""Problems for the summed loss of a softmax, its definition, and gradients of either."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.ops import softmax
from vqcx_jax.ops.codebook.reference import nll_of_logits


class Case(NamedTuple):
    vocab_size: int
    token_block: int = 4
    leading: tuple[int, ...] = (2, 5)
    dim: int = 16
    bias_scale: float | None = 1.0
    logit_scale: float = 1.0
    z_loss: float = 0.1
    cap: float | None = None


class Inputs(NamedTuple):
    h: jax.Array
    weights: jax.Array
    targets: jax.Array
    counts: jax.Array
    bias: jax.Array | None
    z_loss: jax.Array


def make(case: Case, dtype: Any = jnp.float32) -> Inputs:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    bias = None
    if case.bias_scale is not None:
        bias = jnp.asarray(case.bias_scale * normal(case.vocab_size), jnp.float32)
    positions = np.arange(np.prod(case.leading, dtype=int)).reshape(case.leading)
    return Inputs(
        h=jnp.asarray(case.logit_scale * normal((*case.leading, case.dim)), dtype),
        weights=jnp.asarray(normal((case.vocab_size, case.dim)) / case.dim**0.5, dtype),
        targets=jnp.asarray(rng.integers(case.vocab_size, size=case.leading), jnp.int32),
        counts=jnp.asarray(positions % 3 != 1),
        bias=bias,
        z_loss=jnp.float32(case.z_loss),
    )


def sums(nll: Callable[..., Any]) -> Callable[..., Any]:
    """What `summed_nll` computes, of a function that returns nll and log Z of every position."""

    def summed(
        h: Any, weights: Any, targets: Any, counts: Any, bias: Any, z_loss: Any, cap: Any = None
    ) -> Any:
        each_nll, log_z = nll(h, weights, targets, bias, cap)
        total = jnp.sum(jnp.where(counts, each_nll, 0.0))
        return total + z_loss * jnp.sum(jnp.where(counts, log_z**2, 0.0)), total

    return summed


def definition(h: Any, weights: Any, targets: Any, bias: Any, cap: float | None) -> Any:
    z = h @ weights.T
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    return nll_of_logits(z if bias is None else z + bias, targets)


def plain(h: Any, weights: Any, targets: Any, bias: Any, cap: float | None) -> Any:
    return softmax.nll(h, weights, targets, bias, cap=cap)


def float32_logits(h: Any, weights: Any, targets: Any, bias: Any, cap: float | None) -> Any:
    """What a bfloat16 layer does plainly: float32 logits, and JAX's own gradient of them.

    Their cotangent stays float32, which is slow and the most accurate.
    """
    assert cap is None
    z = jnp.einsum("...d,vd->...v", h, weights, preferred_element_type=jnp.float32)
    return nll_of_logits(z if bias is None else z + bias, targets)


def values_and_gradients(summed: Callable[..., Any]) -> Callable[[Inputs], Any]:
    """(loss, nll), and the gradients of -1.7 loss by h, weights, bias and z_loss."""

    def function(x: Inputs) -> Any:
        def loss(h: Any, weights: Any, bias: Any, z_loss: Any) -> Any:
            return summed(h, weights, x.targets, x.counts, bias, z_loss)

        values, vjp = jax.vjp(loss, x.h, x.weights, x.bias, x.z_loss)
        return values, vjp((jnp.full_like(values[0], -1.7), jnp.zeros_like(values[1])))

    return function


def rms_error(actual: Any, expected: np.ndarray) -> float:
    difference = np.asarray(actual, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
