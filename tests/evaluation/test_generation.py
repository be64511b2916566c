import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import random_state, tiny_config

from vqcx_jax.data.tokenizers.byte import ByteTokenizer
from vqcx_jax.evaluation.generation import _sample, generate
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
    return prepare(tiny_config(directory), directory / "none", None)


@pytest.fixture(scope="module")
def state(setup: Setup) -> TrainState:
    return random_state(setup)


def continuation(setup: Setup, state: TrainState, seed: int, temperature: float) -> list[int]:
    graphdef, _, _ = functional.split(abstract_model(setup.config))
    tokens = generate(
        graphdef,
        state.params,
        state.buffers,
        PROMPT,
        NUM_TOKENS,
        seed=seed,
        temperature=temperature,
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


def test_seed_decides_the_text(setup: Setup, state: TrainState) -> None:
    first = continuation(setup, state, seed=0, temperature=1.0)
    assert continuation(setup, state, seed=0, temperature=1.0) == first
    assert continuation(setup, state, seed=1, temperature=1.0) != first


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = jnp.array([[0.0, 1.0, -1.0, 2.0]])
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = jax.vmap(lambda key: _sample(logits, key, jnp.float32(temperature)))(keys)
    frequencies = np.bincount(tokens.ravel(), minlength=4) / 20_000
    expected = jax.nn.softmax(logits[0] / temperature)
    np.testing.assert_allclose(frequencies, expected, atol=0.015)


def test_temperature_0_takes_the_lowest_of_equal_tokens() -> None:
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0]])
    assert _sample(logits, jax.random.key(0), jnp.float32(0.0)).tolist() == [1]


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


def test_empty_prompt_begins_a_document(setup: Setup, state: TrainState) -> None:
    assert text(setup, with_bias(state, ord("b"), 1000.0), prompt="") == "b" * NUM_TOKENS
