import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_run import random_state, tiny_config
from versions import oldest_jax

from vqcx_jax.data import Document, evaluation_dataset
from vqcx_jax.data.tokenizers.byte import ByteTokenizer
from vqcx_jax.evaluation.perplexity import (
    SplitLoss,
    doubling_bounds,
    make_eval_step,
    split_loss,
)
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training.setup import Setup, prepare
from vqcx_jax.training.state import TrainState

TOKENIZER = ByteTokenizer()
SEQ_LEN = 32
# Tokens of the documents, ends included: a document that crosses the end of a row would be cut.
TOKENS = [16, 16, 32, 8, 24, 16, 8, 8, 32, 24, 8, 16]


def test_three_ways_to_say_it() -> None:
    loss = SplitLoss(nll=600.0, tokens=300)
    assert loss.per_token == 2.0
    assert loss.perplexity == pytest.approx(math.e**2)
    assert loss.word_perplexity(words=100) == pytest.approx(math.e**6)
    # A uniform choice among 256 bytes is 8 bits a byte.
    uniform = SplitLoss(nll=50 * math.log(256), tokens=17)
    assert uniform.bits_per_byte(num_bytes=50) == pytest.approx(8.0)


def test_perplexity_beyond_floating_point_is_infinite() -> None:
    """Such as that of one very long word."""
    assert SplitLoss(nll=1e5, tokens=10**5).word_perplexity(words=1) == math.inf
    assert SplitLoss(nll=1e5, tokens=1).perplexity == math.inf


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    directory = tmp_path_factory.mktemp("perplexity")
    return prepare(tiny_config(directory), directory / "none", None)


@pytest.fixture(scope="module")
def state(setup: Setup) -> TrainState:
    return random_state(setup)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    generator = np.random.default_rng(0)
    letters = list("abcdefgh ")
    texts = ["x" + "".join(generator.choice(letters, n - 2)) for n in TOKENS]
    return [Document(text=text, name=str(i)) for i, text in enumerate(texts)]


def evaluate(
    setup: Setup, state: TrainState, documents: list[Document], batch_size: int, **options: Any
) -> SplitLoss:
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, "auto", jax.devices()[:1])
    graphdef, _, _ = functional.split(abstract_model(setup.config))
    loss_options = {name: options.pop(name) for name in ("bounds", "max_batches") & options.keys()}
    batches = evaluation_dataset(
        documents, TOKENIZER, vocab_size=264, seq_len=SEQ_LEN, batch_size=batch_size, **options
    )
    with jax.set_mesh(mesh):
        return split_loss(
            make_eval_step(graphdef),
            state.params,
            state.buffers,
            batches,
            mesh,
            setup.config.sharding,
            **loss_options,
        )


def documents_nll(setup: Setup, state: TrainState, documents: list[Document]) -> list[np.ndarray]:
    """-log p of the tokens of each document and of its end, from its logits alone."""
    graphdef, _, _ = functional.split(abstract_model(setup.config))

    @jax.jit
    def log_probabilities(inputs: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state.params, state.buffers)
        return jax.nn.log_softmax(model.head.logits(model.hidden(inputs[None]))[0])

    nll = []
    for document in documents:
        ids = np.array([256, *document["text"].encode(), 256])
        log_p = np.asarray(log_probabilities(ids[:-1]), np.float64)
        nll.append(-log_p[np.arange(len(ids) - 1), ids[1:]])
    return nll


def test_packed_loss_is_that_of_the_documents_alone(
    setup: Setup, state: TrainState, documents: list[Document]
) -> None:
    loss = evaluate(setup, state, documents, batch_size=4)
    assert loss.tokens == sum(TOKENS)
    expected = np.concatenate(documents_nll(setup, state, documents))
    assert loss.nll == pytest.approx(expected.sum(), rel=1e-6)


@oldest_jax
def test_loss_by_position(setup: Setup, state: TrainState, documents: list[Document]) -> None:
    # Two rows of padding in the second batch; no document has a position 40.
    loss = evaluate(setup, state, documents, batch_size=5, bounds=(1, 10, 40))
    assert [(part.first, part.last) for part in loss.by_position] == [(0, 0), (1, 9), (10, 39)]
    nll = documents_nll(setup, state, documents)
    for part in loss.by_position:
        expected = np.concatenate([x[part.first : part.last + 1] for x in nll])
        assert part.loss.tokens == len(expected)
        assert part.loss.nll == pytest.approx(expected.sum(), rel=1e-6)
    assert loss.tokens == sum(TOKENS)
    assert loss.nll == pytest.approx(np.concatenate(nll).sum(), rel=1e-6)


def test_position_begins_again_where_a_row_ends(setup: Setup, state: TrainState) -> None:
    """20 tokens and 50: rows of 32 cut the second document after 12 and after 44 of them."""
    texts = [Document(text="x" * (n - 1), name=str(n)) for n in (20, 50)]
    loss = evaluate(setup, state, texts, batch_size=4, bounds=(6, 12))
    buckets = [(part.first, part.last, part.loss.tokens) for part in loss.by_position]
    assert buckets == [(0, 5, 6 * 4), (6, 11, 6 * 3), (12, 31, 8 + 20)]


def test_doubling_bounds() -> None:
    assert doubling_bounds(8, end=32) == [1, 2, 4, 8, 16]
    assert doubling_bounds(8, end=33) == [1, 2, 4, 8, 16, 32]
    assert doubling_bounds(24, end=100) == [1, 3, 6, 12, 24, 48, 96]
    assert doubling_bounds(8, end=4) == [1, 2]
    assert doubling_bounds(1, end=1) == []


@oldest_jax
def test_batch_size_does_not_matter(
    setup: Setup, state: TrainState, documents: list[Document]
) -> None:
    four = evaluate(setup, state, documents, batch_size=4)
    five = evaluate(setup, state, documents, batch_size=5)
    assert five.tokens == four.tokens
    assert five.nll == pytest.approx(four.nll, rel=1e-6)


def test_only_the_first_documents_or_batches(
    setup: Setup, state: TrainState, documents: list[Document]
) -> None:
    some = evaluate(setup, state, documents, batch_size=4, num_documents=3)
    assert some.tokens == sum(TOKENS[:3])
    assert some.nll == pytest.approx(evaluate(setup, state, documents[:3], batch_size=4).nll)
    one_batch = evaluate(setup, state, documents, batch_size=4, max_batches=1)
    assert one_batch.tokens == 4 * SEQ_LEN


@oldest_jax
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
@pytest.mark.parametrize("second_axis", ["tensor", "sequence"])
def test_mesh_does_not_matter(
    setup: Setup, state: TrainState, documents: list[Document], axis_type: str, second_axis: str
) -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, second_axis: 2}, axis_type)
    rules = dataclasses.replace(setup.config.sharding, sequence=("sequence",))
    model = abstract_model(setup.config, rules)
    graphdef, _, _ = functional.split(model)
    shardings = functional.shardings(model, mesh, rules)
    params, buffers = jax.device_put((state.params, state.buffers), shardings)
    batches = evaluation_dataset(
        documents, TOKENIZER, vocab_size=264, seq_len=SEQ_LEN, batch_size=4
    )
    with jax.set_mesh(mesh):
        eight = split_loss(
            make_eval_step(graphdef), params, buffers, batches, mesh, rules, bounds=(10,)
        )
    one = evaluate(setup, state, documents, batch_size=4, bounds=(10,))
    for part, expected in zip(
        (eight, *(part.loss for part in eight.by_position)),
        (one, *(part.loss for part in one.by_position)),
        strict=True,
    ):
        assert part.tokens == expected.tokens
        assert part.nll == pytest.approx(expected.nll, rel=1e-6)
