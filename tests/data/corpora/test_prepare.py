import subprocess
import sys

import pytest

from vqcx_jax.data.corpora.base import Document, Recipe
from vqcx_jax.data.corpora.prepare import prepare
from vqcx_jax.errors import DataError


def _recipe(fingerprint="one", **texts):
    def documents(split):
        return lambda: (Document(text=t, name=f"{split}{i}") for i, t in enumerate(texts[split]))

    return Recipe("sample", fingerprint, {split: documents(split) for split in texts})


def test_documents_are_stored_and_read_back(tmp_path):
    corpus = prepare(_recipe(train=["a", "é\n\n", "c"], test=["d"]), tmp_path)
    assert {d["name"]: d["text"] for d in corpus.split("train")} == {
        "train0": "a",
        "train1": "é\n\n",
        "train2": "c",
    }
    assert corpus.split("test")[0] == {"text": "d", "name": "test0"}


def test_order_is_the_same_every_time(tmp_path):
    texts = [str(i) for i in range(50)]
    first = [d["text"] for d in prepare(_recipe(train=texts), tmp_path / "a").split("train")]
    second = [d["text"] for d in prepare(_recipe(train=texts), tmp_path / "b").split("train")]
    assert first == second
    assert sorted(first) == sorted(texts)


def test_second_call_reads_the_stored_corpus(tmp_path):
    prepare(_recipe(train=["a"]), tmp_path)

    def fail():
        raise AssertionError("generated again")
        yield

    corpus = prepare(Recipe("sample", "one", {"train": fail}), tmp_path)
    assert corpus.split("train")[0]["text"] == "a"


def test_another_fingerprint_is_another_corpus(tmp_path):
    prepare(_recipe(train=["a"]), tmp_path)
    assert prepare(_recipe("two", train=["b"]), tmp_path).split("train")[0]["text"] == "b"


def test_blank_documents_are_dropped(tmp_path):
    assert len(prepare(_recipe(train=["", " \n", "a"]), tmp_path).split("train")) == 1


def test_empty_split_is_an_error_and_leaves_no_corpus(tmp_path):
    with pytest.raises(DataError, match="test split of sample has no documents"):
        prepare(_recipe(train=["a"], test=[" "]), tmp_path)
    assert len(prepare(_recipe(train=["a"], test=["b"]), tmp_path).split("test")) == 1


def test_interrupted_preparation_leaves_no_corpus(tmp_path):
    def interrupted():
        yield Document(text="half", name="half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Recipe("sample", "one", {"train": interrupted}), tmp_path)
    assert not list(tmp_path.rglob("*array_record*"))
    assert prepare(_recipe(train=["whole"]), tmp_path).split("train")[0]["text"] == "whole"


def test_corpus_that_another_process_stored_first_is_read(tmp_path):
    def overtaken():
        yield Document(text="a", name="a")
        prepare(_recipe(train=["a"]), tmp_path)

    corpus = prepare(Recipe("sample", "one", {"train": overtaken}), tmp_path)
    assert [d["text"] for d in corpus.split("train")] == ["a"]


def test_preparation_prints_nothing_and_needs_no_tensorflow(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from vqcx_jax.data import open_corpus\n"
        "from vqcx_jax.config import schema\n"
        "(pathlib.Path(sys.argv[1]) / 'a.txt').write_text('some text')\n"
        "cfg = schema.TextFiles(path=sys.argv[1], validation_path=sys.argv[1])\n"
        "assert len(open_corpus(cfg, pathlib.Path(sys.argv[1], 'cache')).split('train')) == 1\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_split_is_named(tmp_path):
    with pytest.raises(DataError, match="split='test': sample has none; accepted: train"):
        prepare(_recipe(train=["a"]), tmp_path).split("test")
