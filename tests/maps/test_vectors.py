"""Where vectors come from: co-occurrence against a dense reference, files, checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import save_checkpoint, tiny_config

from vqcx_jax import checkpoint
from vqcx_jax.data import tokenizer_fingerprint
from vqcx_jax.data.tokenizers.byte import ByteTokenizer
from vqcx_jax.errors import CheckpointError, DataError
from vqcx_jax.maps import vectors as module
from vqcx_jax.maps.run_vectors import head_vectors
from vqcx_jax.maps.vectors import cooccurrence_vectors, load_vectors

# ---------------------------------------------------------------- co-occurrence

DOCUMENTS = [
    np.random.default_rng(seed).zipf(1.5, size=n).clip(max=10).astype(np.int32) - 1
    for seed, n in enumerate([0, 1, 2, 50, 80, 7])
]


def dense_ppmi(window: int, contexts: list[int]) -> np.ndarray:
    """(12, 2C) by the definition; tokens 10 and 11 never occur."""
    pairs = np.zeros((12, 2 * len(contexts)))
    for document in DOCUMENTS:
        for i, token in enumerate(document):
            for j in range(max(0, i - window), min(len(document), i + window + 1)):
                if j != i and document[j] in contexts:
                    column = contexts.index(document[j]) + (j > i) * len(contexts)
                    pairs[token, column] += 1 / abs(i - j)
    smooth = pairs.sum(0) ** 0.75
    expected = np.outer(pairs.sum(1) / pairs.sum(), smooth / smooth.sum()) * pairs.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(np.log(pairs / expected), 0, where=pairs > 0, out=np.zeros_like(pairs))


@pytest.mark.parametrize("chunk", [1, 60, 10**6])
@pytest.mark.parametrize(("window", "num_contexts"), [(1, 100), (3, 100), (3, 4)])
def test_vectors_are_those_of_the_definition(
    window: int, num_contexts: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_TOKENS", chunk)
    counts = np.bincount(np.concatenate(DOCUMENTS), minlength=12)
    contexts = np.argsort(-counts, kind="stable")[:num_contexts].tolist()
    u, s, _ = np.linalg.svd(dense_ppmi(window, contexts), full_matrices=False)
    expected = u[:, :3] * np.sqrt(s[:3])
    vectors = cooccurrence_vectors(iter(DOCUMENTS), 12, 3, window=window, num_contexts=num_contexts)
    assert vectors.shape == (12, 3) and vectors.dtype == np.float32
    # Signs of singular vectors are free; inner products are not.
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-3)
    assert np.all(np.diff(np.linalg.norm(vectors, axis=0)) < 0)
    np.testing.assert_allclose(vectors[10:], 0, atol=1e-5)


def test_pairs_do_not_cross_documents() -> None:
    apart = [np.asarray([0, 1]), np.asarray([2, 3])]
    together = module._count_pairs([np.concatenate(apart)], np.arange(4), 4, window=2).toarray()
    pairs = module._count_pairs(apart, np.arange(4), 4, window=2).toarray()
    before, behind = pairs[:, :4], pairs[:, 4:]
    assert before[1, 0] == behind[0, 1] == before[3, 2] == behind[2, 3] == 1
    assert pairs.sum() == 4
    assert together[2, 1] == 1 and together[2, 0] == 0.5


def test_same_text_same_vectors() -> None:
    first, again = (cooccurrence_vectors(DOCUMENTS, 12, 3) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_tokens_of_like_contexts_are_near() -> None:
    """Words 0 and 1 both stand between 4s, 2 and 3 between 5s; who goes with whom is text alone."""
    rng = np.random.default_rng(0)
    documents = [
        np.stack([np.full(40, 4 + kind), 2 * kind + rng.integers(2, size=40)], axis=1).ravel()
        for kind in (0, 1) * 20
    ]
    rows = cooccurrence_vectors(documents, 6, 3, window=1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert rows[0] @ rows[1] > 0.9 and rows[2] @ rows[3] > 0.9
    assert rows[0] @ rows[2] < 0.5


@pytest.mark.parametrize(("dim", "num_contexts", "most"), [(12, 100, 11), (8, 4, 7)])
def test_dim_must_fit(dim: int, num_contexts: int, most: int) -> None:
    with pytest.raises(DataError, match=f"^dim={dim}: must be at most {most}"):
        cooccurrence_vectors(DOCUMENTS, 12, dim, num_contexts=num_contexts)


# ---------------------------------------------------------------- files

NOT_FINITE = np.ones((12, 4))
NOT_FINITE[3, 2] = np.nan


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int32])
def test_load_vectors(tmp_path: Path, dtype: Any) -> None:
    vectors = np.arange(48).reshape(12, 4).astype(dtype)
    np.save(tmp_path / "v.npy", vectors)
    np.testing.assert_array_equal(load_vectors(tmp_path / "v.npy", 12), vectors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no such file", id="missing"),
        pytest.param(b"", "not a readable .npy file", id="empty"),
        pytest.param(b"hello world", "not a readable .npy file", id="text"),
        pytest.param(b"PK\x03\x04 zip?", "not a readable .npy file", id="broken_zip"),
        pytest.param(np.array([{}]), "not a readable .npy file", id="pickled"),
        pytest.param(np.ones((11, 4)), r"shape \(11, 4\).*one row a token, \(12, D\)", id="rows"),
        pytest.param(np.ones(12), r"shape \(12,\).*one row a token, \(12, D\)", id="one_axis"),
        pytest.param(np.array([["a"]] * 12), "has dtype <U1: expected numbers", id="strings"),
        pytest.param(NOT_FINITE, "must be finite as float32", id="nan"),
        pytest.param(np.full((12, 2), 1e200), "must be finite as float32", id="wide"),
        pytest.param(np.zeros((12, 0)), "expected one row a token", id="no width"),
    ],
)
def test_bad_vectors_are_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "v.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError, match=f"^vectors='.*v.npy'.*{message}") as caught:
        load_vectors(path, 12)
    assert "\n" not in str(caught.value)


def test_truncated_file_and_directory(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, np.ones((12, 4)))
    path.write_bytes(path.read_bytes()[:-1])
    for bad in (path, tmp_path):
        with pytest.raises(DataError, match="^vectors=.*not a readable .npy file$"):
            load_vectors(bad, 12)


# ---------------------------------------------------------------- checkpoints

BYTES = tokenizer_fingerprint(ByteTokenizer())


def test_head_of_the_newest_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__head__kind="full")
    save_checkpoint(config, tmp_path / "run", step=1)
    (tmp_path / "run/checkpoints/1").rename(tmp_path / "1")
    state = save_checkpoint(config, tmp_path / "run", step=2)
    weights = np.asarray(state.params["head"]["weights"])
    vectors = head_vectors(tmp_path / "run", 264, BYTES)
    assert isinstance(vectors, np.ndarray) and vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, weights)
    np.testing.assert_array_equal(head_vectors(tmp_path / "1", 264, BYTES), weights)

    for vocab_size, tokenizer in ((257, BYTES), (264, "xyz")):
        with pytest.raises(DataError, match="^vectors=.*another vocabulary, 264 tokens of the tok"):
            head_vectors(tmp_path / "run", vocab_size, tokenizer)
    with pytest.raises(CheckpointError, match="no array 'params/head/vectors'"):
        checkpoint.load_parameter(tmp_path / "run/checkpoints", 2, "head/vectors")


def test_run_without_a_full_head(tmp_path: Path) -> None:
    save_checkpoint(tiny_config(tmp_path), tmp_path / "run")
    with pytest.raises(DataError, match="^vectors='.*run': a run with model.head.kind='vq'"):
        head_vectors(tmp_path / "run", 264, BYTES)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint found there"):
        head_vectors(tmp_path, 264, BYTES)
