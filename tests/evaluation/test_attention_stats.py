"""Attention weights by distance against a loop, and what encodings have learned."""

import jax
import numpy as np
import pytest
from attention_kinds import HEAD_DIM, KINDS, NUM_HEADS, NUM_KV_HEADS, VOCAB_SIZE, make_model
from versions import oldest_jax

from vqcx_jax.evaluation.attention_stats import (
    AttentionByDistance,
    attention_by_distance,
    learned_arrays,
)
from vqcx_jax.nn.transformer import Block
from vqcx_jax.ops import attention as ops

pytestmark = oldest_jax

# The second row ends in padding.
BATCH = {
    "inputs": np.random.default_rng(1).integers(VOCAB_SIZE, size=(2, 9), dtype=np.int32),
    "segment_ids": np.asarray([[1] * 4 + [2] * 5, [1] * 2 + [2] * 4 + [0] * 3], np.int32),
    "positions": np.asarray([[*range(4), *range(5)], [*range(2), *range(4), 0, 0, 0]], np.int32),
}


@pytest.mark.parametrize("name", ["complex_window_soft_cap", "rope"])
def test_sums_by_distance(name: str) -> None:
    """Two batches, of the rows one by one: the model's own layers, and a loop over all pairs."""
    model = make_model(name)
    window = KINDS[name].window or 9
    info = model.blocks.attention.encoding.info(BATCH["segment_ids"], BATCH["positions"])
    sums, pairs = np.zeros((2, NUM_HEADS, 9)), np.zeros(9)

    @jax.jit
    def run(block: Block, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = block.attention.weights(block.attention_norm(x), info)
        return weights, block(x, info)[0]

    x = model.embed(BATCH["inputs"])
    for layer in range(2):
        block = jax.tree.map(lambda stacked, layer=layer: stacked[layer], model.blocks)
        weights, x = map(np.asarray, run(block, x))
        for row, query, key in np.ndindex(2, 9, 9):
            segment = BATCH["segment_ids"][row]
            if 0 <= query - key < window and segment[query] == segment[key] != 0:
                sums[layer, :, query - key] += weights[row, :, query, key]
                pairs[query - key] += layer == 0
    batches = [{name: x[row : row + 1] for name, x in BATCH.items()} for row in range(2)]
    actual = attention_by_distance(model, batches)
    np.testing.assert_allclose(actual.sums, sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(actual.pairs, pairs)
    # 15 tokens, each of which gives away a weight of 1.
    np.testing.assert_allclose(actual.sums.sum(axis=-1), 15, rtol=1e-6)
    assert actual.pairs[0] == 15


def test_means_of_buckets() -> None:
    sums, pairs = np.asarray([[[4.0, 3.0, 1.0, 0.0, 0.0]]]), np.asarray([8, 4, 4, 0, 0])
    by_distance = AttentionByDistance(sums, pairs)
    means = by_distance.means(np.asarray([0, 1, 3]))
    np.testing.assert_array_equal(means, [[[0.5, 0.5, np.nan]]])


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "complex": {"delta": (2, 2, 4), "bias": (2, 4, 4), "frequencies": (4,)},
    "complex_learned": {
        "delta": (2, 2, 4),
        "bias": (2, 4, 4),
        "log_ratio": (2, 2, 4),
        "frequencies": (2, 2, 4),
    },
    "smooth": {"a": (2, 2, 8), "bias": (2, 4, 4), "frequencies": (4,)},
    "harmonic3_per_head": {
        "weights": (2, 4, 3, 4),
        "bias": (2, 4, 3, 4),
        "frequencies": (2, 4),
    },
    "eulerformer": {"delta": (2, 1), "bias": (2, 1), "frequencies": (4,)},
    "rope": {"frequencies": (4,)},
    "rope_learned_yarn": {"log_ratio": (2, 4), "frequencies": (2, 4)},
    "pope": {"bias": (2, 4, 8), "frequencies": (8,)},
    "alibi": {},
}


@pytest.mark.parametrize("name", SHAPES)
def test_learned_arrays(name: str) -> None:
    arrays = learned_arrays(make_model(name))
    assert {name: array.shape for name, array in arrays.items()} == SHAPES[name]
    if name == "complex_learned":
        first = ops.per_head_frequencies(NUM_KV_HEADS, HEAD_DIM)
        expected = first * np.exp(arrays["log_ratio"])
        np.testing.assert_allclose(arrays["frequencies"], expected, rtol=1e-6)
    if name == "rope_learned_yarn":
        trained = ops.rope_frequencies(HEAD_DIM) * np.exp(arrays["log_ratio"])
        expected = ops.yarn_frequencies(trained, 4.0, 64)
        np.testing.assert_allclose(arrays["frequencies"], expected, rtol=1e-6)
    if name == "pope":  # As they are used, and some were above 0.
        assert arrays["bias"].max() == 0.0 > arrays["bias"].min()
