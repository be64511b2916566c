"""Sampling text from a model, with a KV cache."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqcx_jax.errors import UserError
from vqcx_jax.nn import KVCache, Transformer
from vqcx_jax.nn.functional import Tree


def generate(
    graphdef: nnx.GraphDef,
    params: Tree,
    buffers: Tree,
    prompt: np.ndarray,
    num_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """Continues a prompt.

    Args:
        graphdef, params, buffers: `nn.functional.split` of a Transformer.
        prompt: int (T,), T >= 1; start it with the tokenizer's eos_id.
        num_tokens: how many tokens to add.
        seed: same seed, same text.
        temperature: 0: the most probable token each time (ties: the lowest id).
        top_k: only the so many most probable tokens. None, or V and more: all.
        top_p: of those, only the smallest set with at least this probability. None: all.

    Returns:
        int32 (num_tokens,).

    Raises:
        UserError: a negative temperature, top_k below 1, top_p not in (0, 1].
    """
    _check(temperature, top_k, top_p)
    tokens = _generate(
        graphdef,
        params,
        buffers,
        jnp.asarray(prompt, jnp.int32)[None],
        jax.random.key(seed),
        jnp.float32(temperature),
        None if top_p is None else jnp.float32(top_p),
        top_k=top_k,
        num_tokens=num_tokens,
    )
    return np.asarray(tokens[0])


@partial(jax.jit, static_argnames=("graphdef", "top_k", "num_tokens"))
def _generate(
    graphdef: nnx.GraphDef,
    params: Tree,
    buffers: Tree,
    prompt_BxT: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    *,
    top_k: int | None,
    num_tokens: int,
) -> jax.Array:
    model: Transformer = nnx.merge(graphdef, params, buffers)
    batch_size, prompt_length = prompt_BxT.shape
    cache = model.empty_cache(batch_size, prompt_length + num_tokens)
    h_BxTxD, cache = model.extend(prompt_BxT, cache, 0)
    sample = model.head.sampler(temperature=temperature, top_k=top_k, top_p=top_p)

    def decode(
        carry: tuple[jax.Array, KVCache], index_and_key: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, KVCache], jax.Array]:
        h_Bx1xD, cache = carry
        index, key = index_and_key
        token_Bx1 = sample(h_Bx1xD, key)
        h_Bx1xD, cache = model.extend(token_Bx1, cache, prompt_length + index)
        return (h_Bx1xD, cache), token_Bx1[:, 0]

    steps = jnp.arange(num_tokens), jax.random.split(key, num_tokens)
    _, tokens_NxB = jax.lax.scan(decode, (h_BxTxD[:, -1:], cache), steps)
    return tokens_NxB.T


def _check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: must be a finite number, 0 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: must be 1 or more, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1, or None")
