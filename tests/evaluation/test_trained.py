import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import save_checkpoint, tiny_config, write_documents
from versions import oldest_jax

from vqcx_jax.errors import CheckpointError, ConfigError, DataError
from vqcx_jax.evaluation import TrainedModel
from vqcx_jax.training.state import TrainState

pytestmark = oldest_jax


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def saved(workdir: Path) -> TrainState:
    config = tiny_config(workdir)
    save_checkpoint(config, workdir / "run", step=3)
    return save_checkpoint(config, workdir / "run", step=8)


@pytest.fixture(scope="module")
def model(workdir: Path, saved: TrainState) -> TrainedModel:
    return TrainedModel.load(workdir / "run")


def test_what_is_loaded(workdir: Path, saved: TrainState, model: TrainedModel) -> None:
    assert model.step == 8
    assert model.config == tiny_config(workdir)
    assert model.tokenizer.to_json() == {"kind": "bytes"}
    jax.tree.map(np.testing.assert_array_equal, model.params, saved.params)
    jax.tree.map(np.testing.assert_array_equal, model.buffers, saved.buffers)
    table = model.params["embedding"]["table"]
    assert table.addressable_shards[0].data.shape == (264, 16 // 8)


def test_a_copied_checkpoint_is_enough(workdir: Path, model: TrainedModel, tmp_path: Path) -> None:
    shutil.copytree(workdir / "run/checkpoints/8", tmp_path / "copy/8")
    for path in (tmp_path / "copy", tmp_path / "copy/8"):
        copy = TrainedModel.load(path)
        assert copy.step == 8
        jax.tree.map(np.testing.assert_array_equal, copy.params, model.params)
    texts = [m.generate("the", max_tokens=10, seed=0, temperature=0.0) for m in (copy, model)]
    assert texts[0] == texts[1]


def test_missing_step(workdir: Path, saved: TrainState) -> None:
    assert TrainedModel.load(workdir / "run", 3).step == 3
    with pytest.raises(CheckpointError, match="step=5: .* has the steps \\[3, 8\\]"):
        TrainedModel.load(workdir / "run", 5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"model__embed_dim": "12", "mesh__fsdp": "4"},
        {
            "model__mlp_dim": "36",
            "sharding__batch": "data",
            "sharding__embed": "",
            "sharding__mlp": "fsdp",
            "mesh__fsdp": "4",
        },
        {
            "model__vocab_size": "268",
            "sharding__embed": "",
            "sharding__vocab": "fsdp",
            "mesh__fsdp": "4",
        },
        {"sharding__batch": "data"},
    ],
)
def test_mesh_and_rules_of_the_training_run_do_not_matter(
    tmp_path: Path, overrides: dict[str, str]
) -> None:
    state = save_checkpoint(tiny_config(tmp_path, **overrides), tmp_path / "run")
    loaded = TrainedModel.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, state.params)
    assert loaded.perplexity("validation").loss.tokens > 0


def test_perplexity(workdir: Path, model: TrainedModel) -> None:
    result = model.perplexity("train")
    some = model.perplexity("train", num_documents=4)
    assert some.units.documents == 4 < result.units.documents
    # A bytes tokenizer: one token a byte, and one end a document.
    for part in (result, some):
        assert part.loss.tokens == part.units.bytes + part.units.documents
    assert some.loss.nll < result.loss.nll
    assert 1 < result.loss.perplexity < some.loss.word_perplexity(some.units.words)


def test_perplexity_of_another_text(model: TrainedModel, tmp_path: Path) -> None:
    """All of it; the documents here fit into one row, and are not cut."""
    (tmp_path / "a.txt").write_text("the fox")
    (tmp_path / "b.jsonl").write_text('{"text": "a dog"}\n\n{"text": "sleeps"}\n')
    result = model.perplexity(text=str(tmp_path))
    assert (result.units.documents, result.units.words, result.units.bytes) == (3, 5, 18)
    assert result.loss.tokens == 18 + 3 and not result.same_corpus
    parts = [model.perplexity(text=str(tmp_path / name)) for name in ("a.txt", "b.jsonl")]
    assert sum(p.loss.nll for p in parts) == pytest.approx(result.loss.nll, rel=1e-5)
    documents = Path(model.config.data.dataset.path)
    whole = model.perplexity(text=str(documents)).loss
    of_splits = [model.perplexity(split).loss for split in ("train", "validation")]
    assert whole.tokens == sum(loss.tokens for loss in of_splits)
    with pytest.raises(DataError, match="text='none.txt': no such text"):
        model.perplexity(text="none.txt")
    with pytest.raises(ConfigError, match="path='x': must not be given with text='y'"):
        model.perplexity(text="y", path="x")
    with pytest.raises(ConfigError, match="validation_path='x': must not be given, the run had no"):
        model.perplexity(validation_path="x")


def test_text_with_a_validation_text_of_its_own(tmp_path: Path) -> None:
    """It moves together: one of the two would leave the other where it was."""
    write_documents(tmp_path / "held_out.jsonl", count=4, seed=1)
    held_out = str(tmp_path / "held_out.jsonl")
    config = tiny_config(tmp_path, data__dataset__validation_path=held_out)
    save_checkpoint(config, tmp_path / "run")
    model = TrainedModel.load(tmp_path / "run")
    expected = model.perplexity("validation")
    assert expected.units == model.perplexity(text=held_out).units
    (tmp_path / "moved").mkdir()
    path, validation_path = (
        str(shutil.move(tmp_path / name, tmp_path / "moved"))
        for name in ("documents.jsonl", "held_out.jsonl")
    )
    assert model.perplexity(path=path, validation_path=validation_path) == expected
    with pytest.raises(ConfigError, match="path='x': needs validation_path, too; the run had"):
        model.perplexity(path="x")


def test_perplexity_with_another_cache(model: TrainedModel, tmp_path: Path) -> None:
    expected = model.perplexity("validation")
    assert model.perplexity("validation", cache_dir=str(tmp_path / "cache")) == expected
    assert (tmp_path / "cache/corpora").is_dir()


def test_overrides_are_as_if_trained_with_them(
    workdir: Path, saved: TrainState, tmp_path: Path
) -> None:
    """Random weights are the same for both, as none belongs to what is overridden."""
    overrides = {
        "model__attention__window": "9",
        "model__attention__logit_soft_cap": "0.5",
        "model__attention__extension": "yarn",
        "model__attention__extension_factor": "2.5",
        "model__attention__trained_length": "16",
        "model__head__implementation": "xla",
    }
    save_checkpoint(tiny_config(tmp_path, **overrides), tmp_path / "run")
    expected = TrainedModel.load(tmp_path / "run")
    pairs = [(name.replace("__", "."), value) for name, value in overrides.items()]
    overridden = TrainedModel.load(workdir / "run", overrides=pairs)
    assert overridden.config.model == expected.config.model
    nll = [m.perplexity("validation").loss.nll for m in (overridden, expected)]
    assert nll[0] == nll[1]
    texts = [m.generate("the", max_tokens=10, seed=0) for m in (overridden, expected)]
    assert texts[0] == texts[1]


def test_every_override_has_an_effect(workdir: Path, model: TrainedModel) -> None:
    losses = {model.perplexity("validation").loss.nll}
    for overrides in (
        [("model.attention.window", "2")],
        [("model.attention.logit_soft_cap", "0.01")],
        [("model.attention.extension", "linear"), ("model.attention.extension_factor", "4")],
    ):
        other = TrainedModel.load(workdir / "run", overrides=overrides)
        losses.add(other.perplexity("validation").loss.nll)
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [("model.attention.rope_base", "1e6")],
            "model.attention.rope_base='1e6': cannot change after training; accepted are "
            "model.attention.window, .*, model.attention.trained_length",
        ),
        ([("train.steps", "3")], "train.steps='3': cannot change"),
        ([("model.attention.window", "0")], "model.attention.window='0': must be greater"),
        (
            [("model.attention.extension", "yarn"), ("model.attention.extension_factor", "2")],
            "model.attention.trained_length=None: must be the positions of training",
        ),
        ([("model.attention.extension_factor", "2")], "must be 1 with model.attention.extension"),
    ],
)
def test_overrides_that_cannot_be(
    workdir: Path, saved: TrainState, overrides: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainedModel.load(workdir / "run", overrides=overrides)


def test_override_of_another_kind_of_attention(tmp_path: Path) -> None:
    save_checkpoint(tiny_config(tmp_path, model__attention__kind="alibi"), tmp_path / "run")
    with pytest.raises(ConfigError, match="model.attention.extension: no such field with this"):
        TrainedModel.load(tmp_path / "run", overrides=[("model.attention.extension", "ntk")])


def test_longer_rows(model: TrainedModel) -> None:
    short, long = (model.perplexity("train", seq_len=n).loss for n in (None, 128))
    assert long.tokens == short.tokens
    assert long.nll != pytest.approx(short.nll, rel=1e-6)
    buckets = [(part.first, part.last) for part in long.by_position]
    assert buckets[:6] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    assert buckets[6] == (32, 63) and 64 <= buckets[7][1] < 128
    assert short.by_position[-1].last == 31
    for loss in (short, long):
        assert sum(part.loss.tokens for part in loss.by_position) == loss.tokens
        assert sum(part.loss.nll for part in loss.by_position) == pytest.approx(loss.nll)
    # What is cut less has fewer tokens at the beginning.
    assert long.by_position[0].loss.tokens < short.by_position[0].loss.tokens


def test_rows_without_tokens(model: TrainedModel) -> None:
    with pytest.raises(ConfigError, match="data.seq_len='0': must be greater"):
        model.perplexity("train", seq_len=0)


def test_split_that_is_not_there(model: TrainedModel) -> None:
    with pytest.raises(DataError, match="split='test'"):
        model.perplexity("test")


def test_text(model: TrainedModel) -> None:
    first = model.generate("the", max_tokens=10, seed=0)
    assert model.generate("the", max_tokens=10, seed=0) == first
    assert model.generate("the", max_tokens=10, seed=1) != first


def test_options_of_text(model: TrainedModel) -> None:
    greedy = model.generate("the", max_tokens=10, seed=0, temperature=0.0)
    assert model.generate("the", max_tokens=10, seed=1, top_k=1) == greedy
    assert model.generate("the", max_tokens=10, seed=1, top_p=1e-6) == greedy
