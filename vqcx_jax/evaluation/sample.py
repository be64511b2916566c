"""Text in, text out: a prompt continued by a model."""

import dataclasses

import numpy as np

from vqcx_jax.config import schema
from vqcx_jax.data import Tokenizer
from vqcx_jax.evaluation.generation import generate
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.nn.functional import Tree


def sample_text(
    config: schema.Config,
    params: Tree,
    buffers: Tree,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> str:
    """The text that a model adds to a prompt, up to the end of the document.

    Args:
        prompt: may be empty: the model then begins a document.
        num_tokens: at most this many tokens.
        seed, temperature, top_k, top_p: see `generate`.
    """
    # One token of one sequence cannot be split; weights stay sharded as they are.
    rules = dataclasses.replace(config.sharding, batch=(), sequence=())
    graphdef, _, _ = functional.split(abstract_model(config, rules))
    prompt_ids = np.concatenate([[tokenizer.eos_id], tokenizer.encode(prompt)]).astype(np.int32)
    tokens = generate(
        graphdef,
        params,
        buffers,
        prompt_ids,
        num_tokens,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    if ends.size:
        tokens = tokens[: ends[0]]
    return tokenizer.decode(tokens[tokens < tokenizer.vocab_size])
