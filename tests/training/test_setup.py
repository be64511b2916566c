"""What a run may change when it goes on from a checkpoint, and what a user reads if it may not."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import save_checkpoint, tiny_config, write_documents

from vqcx_jax.data import tokenizer_fingerprint
from vqcx_jax.errors import CheckpointError, DataError, UserError
from vqcx_jax.maps import TokenClasses, TokenMap, widths
from vqcx_jax.nn.build import build_model
from vqcx_jax.nn.heads.frequency_order import paths_of
from vqcx_jax.training.setup import Setup, prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def checkpoints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    save_checkpoint(tiny_config(corpus), workdir, step=3)
    return workdir / "checkpoints"


def resume(corpus: Path, checkpoints: Path, **overrides: str) -> Setup:
    return prepare(tiny_config(corpus, **overrides), checkpoints, 3)


def test_the_same_config_goes_on(corpus: Path, checkpoints: Path) -> None:
    setup = resume(corpus, checkpoints)
    assert setup.config == tiny_config(corpus)
    assert setup.token_map is None  # It is in the checkpoint.


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer__learning_rate": "0.5"},
        {"train__steps": "100"},
        {"train__grad_accumulation": "1"},
        {"mesh__fsdp": "8"},
        {"sharding__embed": ""},
        {"data__prefetch": "1"},
        {"model__dtype": "bfloat16"},
        {"model__remat": "full"},
        {"model__attention__implementation": "xla", "model__head__implementation": "xla"},
    ],
)
def test_how_a_run_is_computed_may_change(
    corpus: Path, checkpoints: Path, overrides: dict[str, str]
) -> None:
    assert resume(corpus, checkpoints, **overrides).config == tiny_config(corpus, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__seq_len": "64"}, "data.seq_len=64: the checkpoint"),
        ({"data__batch_size": "16"}, "data.batch_size=16: the checkpoint"),
        ({"data__shuffle_seed": "1"}, "data.shuffle_seed=1: the checkpoint"),
        ({"model__attention__rope_base": "500.0"}, "model.attention.rope_base=500.0: the check"),
        ({"data__tokenizer__kind": "word"}, "data.tokenizer.kind='word': the checkpoint"),
        ({"data__dataset__validation_fraction": "0.5"}, "data.dataset.validation_fraction=0.5:"),
        ({"model__head__assignment": "random"}, "model.head.assignment='random': the checkpoint"),
        ({"train__seed": "1"}, "train.seed=1: the checkpoint"),
        (
            {"train__steps": "2", "optimizer__warmup_steps": "1"},
            "train.steps=2: must be at least 3, which the checkpoint",
        ),
    ],
)
def test_other_data_or_model_is_named(
    corpus: Path, checkpoints: Path, overrides: dict[str, str], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        resume(corpus, checkpoints, **overrides)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert str(checkpoints / "3") in str(caught.value)


def test_other_text_at_the_same_place_is_named(corpus: Path, checkpoints: Path) -> None:
    config = tiny_config(corpus)
    path = corpus / "documents.jsonl"
    before = path.read_text()
    write_documents(path, seed=1)
    with pytest.raises(CheckpointError, match="^data.dataset: its text is not that of the check"):
        prepare(config, checkpoints, 3)
    path.write_text(before)


def test_text_may_move(checkpoints: Path, tmp_path: Path) -> None:
    setup = prepare(tiny_config(tmp_path), checkpoints, 3)
    assert setup.config == tiny_config(tmp_path)


def test_another_architecture_names_every_weight(corpus: Path, checkpoints: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resume(
            corpus,
            checkpoints,
            model__mlp_dim="64",
            model__head__kind="full",
            model__num_layers="3",
        )
    message = str(caught.value)
    assert "\n" not in message
    assert "of another architecture" in message
    for part in (
        "params/blocks/mlp/down: float32(2, 32, 16) in the checkpoint, float32(3, 64, 16) in the",
        "params/blocks/mlp/up: float32(2, 16, 32)",
        "params/blocks/mlp/gate: ",
        "params/blocks/attention/q: ",
        "params/head/codes: float32(32, 16) in the checkpoint, none in the model",
        "params/head/weights: none in the checkpoint, float32(264, 16) in the model",
        "buffers/head/assignment: int32(264,) in the checkpoint, none in the model",
    ):
        assert part in message
    assert "embedding" not in message


def test_token_map_follows_the_counts_of_the_training_text(corpus: Path, tmp_path: Path) -> None:
    setup = prepare(tiny_config(corpus), tmp_path, None)
    assert setup.token_map is not None
    codes = setup.token_map.codes[:, 0]
    assert codes.shape == (264,) and set(codes) == set(range(32))
    # A blank and an e are frequent and have codes of their own; unseen bytes share.
    for character in " e":
        assert np.sum(codes == codes[ord(character)]) == 1
    assert np.sum(codes == codes[0]) > 10


def test_own_tokens_are_the_most_frequent(corpus: Path, tmp_path: Path) -> None:
    setup = prepare(tiny_config(corpus, model__head__num_own_tokens="2"), tmp_path, None)
    assert setup.token_map is not None and setup.token_counts is not None
    assert setup.token_map.own_tokens.tolist() == [ord(" "), ord("e")]
    # Every byte of the vocabulary has a count; those that the tokenizer lacks have none.
    assert setup.token_counts.shape == (264,) and not setup.token_counts[257:].any()
    assert setup.token_counts.argmax() == ord(" ")


def test_token_map_from_a_file_must_be_of_the_tokenizer(corpus: Path, tmp_path: Path) -> None:
    made_for_bytes = prepare(tiny_config(corpus), tmp_path, None)
    assert made_for_bytes.token_map is not None
    fingerprint = tokenizer_fingerprint(made_for_bytes.tokenizer)
    path = tmp_path / "map.npz"
    dataclasses.replace(made_for_bytes.token_map, provenance={"tokenizer": fingerprint}).save(path)
    from_file = {"model__head__assignment": "file", "model__head__token_map": str(path)}
    setup = prepare(tiny_config(corpus, **from_file), tmp_path, None)
    assert setup.token_map is not None
    np.testing.assert_array_equal(setup.token_map.codes, made_for_bytes.token_map.codes)
    with pytest.raises(DataError, match="made for another vocabulary, of the tokenizer"):
        prepare(tiny_config(corpus, **from_file, data__tokenizer__kind="word"), tmp_path, None)


def test_token_map_may_move_but_not_change(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(tiny_config(corpus), tmp_path, None)
    assert first.token_map is not None
    first.token_map.save(tmp_path / "map.npz")
    from_file = {"model__head__assignment": "file"}
    token_map = str(tmp_path / "map.npz")
    config = tiny_config(corpus, **from_file, model__head__token_map=token_map)
    save_checkpoint(config, tmp_path / "run", step=3)
    moved = tiny_config(corpus, **from_file, model__head__token_map="elsewhere.npz")
    # The checkpoint has the map; the file is no longer needed.
    resumed = prepare(moved, tmp_path / "run/checkpoints", 3)
    assert resumed.config == moved
    assert resumed.to_json()["token_map"] == first.to_json()["token_map"]
    # The same codes, with another provenance.
    dataclasses.replace(first.token_map, provenance={}).save(tmp_path / "elsewhere.npz")
    monkeypatch.chdir(tmp_path)
    assert prepare(moved, tmp_path / "run/checkpoints", 3).config == moved
    # Classes, which this head leaves out.
    of_classes = TokenClasses(np.arange(264, dtype=np.int32) % 3, np.zeros((3, 1), np.int32))
    dataclasses.replace(first.token_map, classes=of_classes).save(tmp_path / "elsewhere.npz")
    assert prepare(moved, tmp_path / "run/checkpoints", 3).config == moved
    other = first.token_map.codes[::-1].copy()
    dataclasses.replace(first.token_map, codes=other).save(tmp_path / "elsewhere.npz")
    with pytest.raises(CheckpointError, match="token_map='elsewhere.npz': is not the map of the"):
        prepare(moved, tmp_path / "run/checkpoints", 3)


@pytest.mark.parametrize("assignment", ["frequency", "contiguous", "random", "cooccurrence"])
def test_provenance_of_maps_that_are_made(assignment: str, corpus: Path, tmp_path: Path) -> None:
    """A map that is kept and taken elsewhere must say whose tokens it is of."""
    of_map = {"model__head__assignment": assignment, "model__head__num_codes": "9"}
    config = tiny_config(corpus, **of_map, data__cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # The second time from the cache.
        setup = prepare(config, tmp_path, None)
        assert setup.token_map is not None
        provenance = setup.token_map.provenance
        assert provenance["assignment"] == assignment
        assert provenance["tokenizer"] == tokenizer_fingerprint(setup.tokenizer)
        assert provenance["corpus"]["fingerprint"] == setup.corpus.fingerprint
        assert provenance["count_tokens"] == 20_000_000
        assert provenance.get("seed") == (0 if assignment in ("random", "cooccurrence") else None)
    setup.token_map.save(tmp_path / "map.npz")
    from_file = {"assignment": "file", "token_map": str(tmp_path / "map.npz"), "num_codes": "9"}
    words = {"data__tokenizer__kind": "word"} | {
        f"model__head__{name}": value for name, value in from_file.items()
    }
    with pytest.raises(DataError, match="made for another vocabulary, of the tokenizer"):
        prepare(tiny_config(corpus, **words), tmp_path, None)


def test_tokens_are_ordered_by_the_counts_of_the_training_text(
    corpus: Path, tmp_path: Path
) -> None:
    def token_map(**head: str) -> TokenMap:
        overrides = {f"model__head__{name}": value for name, value in head.items()}
        setup = prepare(tiny_config(corpus, **overrides), tmp_path, None)
        assert setup.token_map is not None
        return setup.token_map

    ranks = token_map(kind="hierarchical").codes
    assert ranks.shape == (264, 1) and ranks[ord(" ")] == 0 and ranks[ord("q")] < ranks[0]
    adaptive = token_map(kind="adaptive", cutoffs="10,60", div_value="2.0")
    np.testing.assert_array_equal(adaptive.codes, ranks)
    paths = paths_of(token_map(kind="hierarchical", tree="huffman"))
    assert paths.shape == (264, 17)
    assert np.sum(paths[ord(" ")] > 0) < np.sum(paths[ord("q")] > 0) < np.sum(paths[0] > 0)


@pytest.mark.parametrize(
    "head",
    [{"model__head__kind": "full"}, {"model__head__kind": "low_rank", "model__head__rank": "4"}],
)
def test_heads_without_a_token_map(corpus: Path, tmp_path: Path, head: dict[str, str]) -> None:
    setup = prepare(tiny_config(corpus, **head), tmp_path, None)
    assert setup.token_map is None and setup.token_counts is None


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "full", "token_bias": "true"},
        {"kind": "low_rank", "rank": "4", "token_bias": "true"},
        {"kind": "vq"},
        {"kind": "class_vq", "assignment": "random", "code_init": "random", "num_codebooks": "4"},
    ],
)
def test_biases_start_where_it_is_asked_for(
    corpus: Path, tmp_path: Path, head: dict[str, str]
) -> None:
    fields = {f"model__head__{name}": value for name, value in head.items()}
    for bias_init in ("counts", "zeros"):
        fields["model__head__bias_init"] = bias_init
        setup = prepare(tiny_config(corpus, **fields), tmp_path, None)
        if bias_init == "zeros":
            assert setup.token_map is None or setup.token_map.bias is None
            continue
        assert setup.token_map is not None and setup.token_counts is not None
        assert setup.token_map.bias is not None
        seen = np.maximum(setup.token_counts, 1)
        np.testing.assert_allclose(np.exp(setup.token_map.bias), seen / seen.sum(), rtol=1e-5)


def test_vocabulary_is_the_tokenizers_unless_it_is_given(corpus: Path, tmp_path: Path) -> None:
    setup = prepare(tiny_config(corpus, model__vocab_size="none"), tmp_path, None)
    assert setup.config.model.vocab_size == setup.tokenizer.vocab_size == 257


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"data__dataset__path": "nowhere"}, "data.dataset.path='nowhere'"),
        ({"data__dataset__text_field": "body"}, "data.dataset.text_field='body'"),
        ({"data__tokenizer__kind": "bpe"}, "data.tokenizer.vocab_size=4096"),
        (
            {"model__vocab_size": "100"},
            "model.vocab_size=100: must be at least the 257 tokens of the tokenizer",
        ),
        (
            {"model__head__assignment": "file", "model__head__token_map": "none.npz"},
            "token map 'none.npz': no such file",
        ),
    ],
)
def test_run_that_cannot_start_writes_nothing(
    corpus: Path, tmp_path: Path, override: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tiny_config(corpus, **override), tmp_path / "run/checkpoints", None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "full", "start": "cooccurrence"},
        {"assignment": "cooccurrence", "code_init": "centroids", "num_codes": "9"},
        {"kind": "class_vq", "code_init": "centroids", "num_codes": "9", "num_codebooks": "4"},
    ],
    ids=lambda head: head.get("kind", "vq"),
)
def test_heads_that_start_from_cooccurrence(
    corpus: Path, tmp_path: Path, head: dict[str, str]
) -> None:
    """The embedding of a map is as wide as the model; a second run reads the map from the cache."""
    changes = {f"model__head__{name}": value for name, value in head.items()}
    first, second = (
        prepare(tiny_config(corpus, **changes), tmp_path / str(i), None) for i in range(2)
    )
    assert first.token_map is not None and second.token_map is not None
    model = build_model(first.config, first.token_map, jax.random.key(0))
    if head.get("kind") == "full":
        rows = np.asarray(model.head.weights[...])
        np.testing.assert_array_equal(rows, first.token_map.own_vectors)
        assert rows.shape == (264, 16) and np.all(np.any(rows[[ord("e"), ord(" ")]], axis=1))
    elif head.get("kind") == "class_vq":
        books, again = first.token_map.codebooks, second.token_map.codebooks
        assert books is not None and again is not None
        np.testing.assert_array_equal(model.head.codebooks[...], np.stack(books))
        np.testing.assert_array_equal(np.stack(books), np.stack(again))
        # The most frequent tokens stand beside the classes.
        assert {ord("e"), ord(" ")} <= set(np.asarray(model.head.entries[...]).tolist())
    else:
        assert len(set(first.token_map.codes[:, 0])) == 9
        np.testing.assert_array_equal(model.head.codes[...], first.token_map.codebooks[0])
        np.testing.assert_array_equal(first.token_map.codes, second.token_map.codes)


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "full", "start": "cooccurrence"},
        {"assignment": "cooccurrence", "code_init": "centroids", "num_codes": "9"},
        {"kind": "class_vq", "num_codes": "9", "num_codebooks": "4"},
    ],
    ids=["full", "vq", "class_vq"],
)
def test_models_wider_than_vectors_from_cooccurrence(
    corpus: Path, tmp_path: Path, head: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D = 320 in a vocabulary of 264: no 320 singular vectors exist, nor are they needed."""
    monkeypatch.setattr(widths, "_MAX_RANK", 8)
    changes = {f"model__head__{name}": value for name, value in head.items()}
    config = tiny_config(corpus, **changes, model__embed_dim="320")
    setup = prepare(config, tmp_path, None)
    assert setup.token_map is not None
    model = build_model(setup.config, setup.token_map, jax.random.key(0))
    if head.get("kind") == "full":
        vectors = np.asarray(model.head.weights[...])
        assert vectors.shape == (264, 320)
        assert np.linalg.matrix_rank(vectors) == 8
    elif head.get("kind") == "class_vq":
        vectors = np.asarray(model.head.codebooks[...])
        assert vectors.shape == (4, 9, 80)
    else:
        vectors = np.asarray(model.head.codes[...])
        assert vectors.shape == (9, 320)
    assert np.all(np.any(vectors, axis=-2))  # Every dimension is used from the beginning.


def test_what_is_counted_is_part_of_what_is_kept(corpus: Path, tmp_path: Path) -> None:
    """A map of the first tokens must not be taken for one of all of the text."""
    head = {"kind": "class_vq", "num_codes": "9", "num_codebooks": "4"}
    changes = {f"model__head__{name}": value for name, value in head.items()}
    changes["data__cache_dir"] = str(tmp_path / "cache")

    def made(limit: str) -> Setup:
        return prepare(tiny_config(corpus, **changes, data__count_tokens=limit), tmp_path, None)

    few, beyond, everything = made("300"), made("1000000"), made("none")
    assert few.token_counts is not None and few.token_counts.sum() == 300
    assert beyond.token_counts is not None and everything.token_counts is not None
    np.testing.assert_array_equal(beyond.token_counts, everything.token_counts)
    maps = [setup.token_map for setup in (few, beyond, everything)]
    assert all(token_map is not None for token_map in maps)
    arrays = [token_map.to_arrays() for token_map in maps if token_map is not None]
    assert np.any(arrays[0]["codes"] != arrays[1]["codes"])
    for name, array in arrays[1].items():
        np.testing.assert_array_equal(array, arrays[2][name])
    assert len(list((tmp_path / "cache/token_maps").iterdir())) == 3


def test_other_sizes_of_classes_are_another_map(corpus: Path, tmp_path: Path) -> None:
    """All of them are kept side by side; how a head is computed makes no other one."""
    head = {"kind": "class_vq", "num_codes": "9", "num_codebooks": "4"}
    changes = {f"model__head__{name}": value for name, value in head.items()}
    changes["data__cache_dir"] = str(tmp_path / "cache")

    def sizes(**overrides: str) -> tuple[int, int]:
        setup = prepare(tiny_config(corpus, **changes, **overrides), tmp_path / "run", None)
        assert setup.token_map is not None and setup.token_map.classes is not None
        classes = setup.token_map.classes
        return len(classes.codes), int(np.sum(classes.of_token < 0))

    for _ in range(2):
        assert sizes() == sizes(model__head__implementation="xla") == (65, 65)
        assert sizes(model__head__num_classes="20") == (20, 65)
        assert sizes(model__head__num_frequent="7") == (65, 7)
    kept = sorted((tmp_path / "cache/token_maps").iterdir())
    assert len(kept) == 3
    loaded = [TokenMap.load(path).classes for path in kept]
    assert {len(classes.codes) for classes in loaded if classes is not None} == {20, 65}


DIFFERENT_MAPS = """
import sys
import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))

from vqcx_jax.maps import TokenClasses, TokenMap
from vqcx_jax.training.setup import _agreed

rng = np.random.default_rng(int(sys.argv[2]))
codebooks = tuple(rng.standard_normal((2, 300, 4), np.float32))
scale = rng.standard_normal(400, np.float32)
classes = TokenClasses(
    rng.permutation(np.arange(400) % 7 - 1).astype(np.int32),
    rng.integers(300, size=(6, 2)).astype(np.int32),
    scale[:6],
)
codes = rng.integers(300, size=(400, 2)).astype(np.int32)
agreed = _agreed(TokenMap(codes, (300, 300), codebooks, scale, classes=classes))
arrays = agreed.to_arrays()
if sys.argv[2] == "0":
    np.testing.assert_array_equal(agreed.codes, codes)
print({name: float(np.float64(x).sum()) for name, x in arrays.items()})
"""


def test_all_processes_take_the_map_of_the_first(tmp_path: Path) -> None:
    """Two real processes that have made different ones."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIFFERENT_MAPS, address, str(index)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (output[0].splitlines()[-1] for output in outputs)
    assert first == second
    assert "class_of_token" in first
