"""Sampling text from a model, with a KV cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
) -> np.ndarray:
    """Continues a prompt.

    Args:
        graphdef, params, buffers: `nn.functional.split` of a Transformer.
        prompt: int (T,), T >= 1; start it with the tokenizer's eos_id.
        num_tokens: how many tokens to add.
        seed: same seed, same text.
        temperature: 0: the most probable token each time (ties: the lowest id).

    Returns:
        int32 (num_tokens,).
    """
    tokens = _generate(
        graphdef,
        params,
        buffers,
        jnp.asarray(prompt, jnp.int32)[None],
        jax.random.key(seed),
        jnp.float32(temperature),
        num_tokens=num_tokens,
    )
    return np.asarray(tokens[0])


@partial(jax.jit, static_argnames=("graphdef", "num_tokens"))
def _generate(
    graphdef: nnx.GraphDef,
    params: Tree,
    buffers: Tree,
    prompt_BxT: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    *,
    num_tokens: int,
) -> jax.Array:
    model: Transformer = nnx.merge(graphdef, params, buffers)
    batch_size, prompt_length = prompt_BxT.shape
    cache = model.empty_cache(batch_size, prompt_length + num_tokens)
    h_BxTxD, cache = model.extend(prompt_BxT, cache, 0)

    def decode(
        carry: tuple[jax.Array, KVCache], index_and_key: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, KVCache], jax.Array]:
        h_Bx1xD, cache = carry
        index, key = index_and_key
        token_B = _sample(model.head.logits(h_Bx1xD)[:, -1], key, temperature)
        h_Bx1xD, cache = model.extend(token_B[:, None], cache, prompt_length + index)
        return (h_Bx1xD, cache), token_B

    steps = jnp.arange(num_tokens), jax.random.split(key, num_tokens)
    _, tokens_NxB = jax.lax.scan(decode, (h_BxTxD[:, -1:], cache), steps)
    return tokens_NxB.T


def _sample(logits_BxV: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    greedy_B = jnp.argmax(logits_BxV, axis=-1)
    sampled_B = jax.random.categorical(key, logits_BxV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled_B, greedy_B).astype(jnp.int32)
