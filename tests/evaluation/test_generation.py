from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import random_state, tiny_config
from versions import oldest_jax

from vqcx_jax.data.tokenizers.byte import ByteTokenizer
from vqcx_jax.errors import UserError
from vqcx_jax.evaluation.generation import generate
from vqcx_jax.evaluation.sample import sample_text
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.training.setup import Setup, prepare
from vqcx_jax.training.state import TrainState

PROMPT = np.array([256, *b"the quick"], np.int32)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    directory = tmp_path_factory.mktemp("generation")
    # With PoPE, random weights repeat one token.
    config = tiny_config(directory, model__attention__kind="complex")
    return prepare(config, directory / "none", None)


@pytest.fixture(scope="module")
def state(setup: Setup) -> TrainState:
    return random_state(setup)


def continuation(
    setup: Setup, state: TrainState, seed: int, temperature: float, **options: Any
) -> list[int]:
    graphdef, _, _ = functional.split(abstract_model(setup.config))
    tokens = generate(
        graphdef,
        state.params,
        state.buffers,
        PROMPT,
        NUM_TOKENS,
        seed=seed,
        temperature=temperature,
        **options,
    )
    assert tokens.shape == (NUM_TOKENS,) and tokens.dtype == np.int32
    return tokens.tolist()


def test_greedy_is_the_argmax_of_the_whole_sequence_each_time(
    setup: Setup, state: TrainState
) -> None:
    graphdef, _, _ = functional.split(abstract_model(setup.config))

    @jax.jit
    def next_token(padded: jax.Array, length: jax.Array) -> jax.Array:
        """Attention is causal: what stands after `length` is not seen."""
        model = nnx.merge(graphdef, state.params, state.buffers)
        return jnp.argmax(model.head.logits(model.hidden(padded[None]))[0, length - 1])

    tokens = PROMPT.tolist()
    for _ in range(NUM_TOKENS):
        padded = np.zeros(len(PROMPT) + NUM_TOKENS, np.int32)
        padded[: len(tokens)] = tokens
        tokens.append(int(next_token(padded, len(tokens))))
    expected = tokens[len(PROMPT) :]
    assert len(set(expected)) > 2
    assert continuation(setup, state, seed=0, temperature=0.0) == expected
    assert continuation(setup, state, seed=1, temperature=0.0) == expected


@oldest_jax
def test_seed_decides_the_text(setup: Setup, state: TrainState) -> None:
    first = continuation(setup, state, seed=0, temperature=1.0)
    assert continuation(setup, state, seed=0, temperature=1.0) == first
    assert continuation(setup, state, seed=1, temperature=1.0) != first


@oldest_jax
def test_one_token_to_choose_from_is_greedy(setup: Setup, state: TrainState) -> None:
    greedy = continuation(setup, state, seed=0, temperature=0.0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 5, "top_p": 1e-6}):
        assert continuation(setup, state, seed=0, temperature=1.0, **options) == greedy


@oldest_jax
@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_tokens_are_among_the_most_probable(
    setup: Setup, state: TrainState, options: dict[str, Any]
) -> None:
    graphdef, _, _ = functional.split(abstract_model(setup.config))

    @jax.jit
    def probabilities(tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state.params, state.buffers)
        return jax.nn.softmax(model.head.logits(model.hidden(tokens[None])))[0]

    ranks = []
    for seed in range(4):
        tokens = continuation(setup, state, seed, 1.0, **options)
        p = np.asarray(probabilities(np.array([*PROMPT, *tokens[:-1]])))[len(PROMPT) - 1 :]
        for p_V, token in zip(p, tokens, strict=True):
            is_better = p_V > p_V[token]
            ranks.append(is_better.sum())
            assert is_better.sum() < options.get("top_k", 264)
            assert p_V[is_better].sum() < options.get("top_p", 1.0)
    assert max(ranks) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be a finite number, 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan: must be a finite number"),
        ({"top_k": 0}, "top_k=0: must be 1 or more, or None"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1, or None"),
        ({"top_p": 1.1}, "top_p=1.1: must be above 0 and at most 1, or None"),
    ],
)
def test_options_out_of_range(
    setup: Setup, state: TrainState, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        continuation(setup, state, seed=0, **{"temperature": 1.0, **options})


def with_bias(state: TrainState, token: int | slice, value: float) -> TrainState:
    head = {**state.params["head"], "bias": jnp.zeros((264,)).at[token].set(value)}
    return TrainState(state.step, {**state.params, "head": head}, state.buffers, state.opt_state)


def text(setup: Setup, state: TrainState, prompt: str = "the", seed: int = 0) -> str:
    return sample_text(
        setup.config, state.params, state.buffers, ByteTokenizer(), prompt, NUM_TOKENS, seed=seed
    )


def raw_text(setup: Setup, state: TrainState, seed: int) -> str:
    """All tokens that are generated, with | for the end of a document."""
    graphdef, _, _ = functional.split(abstract_model(setup.config))
    prompt = np.array([256, *b"the"])
    tokens = generate(graphdef, state.params, state.buffers, prompt, NUM_TOKENS, seed=seed)
    return "".join("|" if token == 256 else chr(token) for token in tokens)


@oldest_jax
def test_text_stops_at_the_end_of_the_document(setup: Setup, state: TrainState) -> None:
    assert text(setup, with_bias(state, 256, 1000.0)) == ""
    assert text(setup, with_bias(state, ord("b"), 1000.0)) == "b" * NUM_TOKENS
    # Letters only, and the end among them.
    mixed = with_bias(state, slice(97, 105), 1000.0)
    mixed.params["head"]["bias"] = mixed.params["head"]["bias"].at[256].set(1000.0)
    endless = [raw_text(setup, mixed, seed) for seed in range(8)]
    assert len({raw.find("|") for raw in endless}) > 2
    for seed, raw in enumerate(endless):
        assert text(setup, mixed, seed=seed) == raw.partition("|")[0]


def test_ids_that_the_tokenizer_does_not_have_are_left_out(setup: Setup, state: TrainState) -> None:
    assert text(setup, with_bias(state, 260, 1000.0)) == ""


@oldest_jax
def test_empty_prompt_begins_a_document(setup: Setup, state: TrainState) -> None:
    assert text(setup, with_bias(state, ord("b"), 1000.0), prompt="") == "b" * NUM_TOKENS
