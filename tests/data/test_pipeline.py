import itertools
import json

import grain
import numpy as np
import pytest

from vqcx_jax.data.corpora import Document
from vqcx_jax.data.counts import count_units, token_counts
from vqcx_jax.data.pipeline import evaluation_dataset, training_dataset
from vqcx_jax.data.tokenizers.byte import ByteTokenizer
from vqcx_jax.errors import DataError

EOS = 256
TOKENIZER = ByteTokenizer()


def _source(*texts):
    return [Document(text=text, name=f"doc{i}") for i, text in enumerate(texts)]


@pytest.fixture
def letters():
    """Documents of 1 to 9 letters, each with its own letter."""
    return _source(*(chr(97 + i) * (i % 9 + 1) for i in range(23)))


def _train(source, **options):
    defaults = {"vocab_size": 257, "seq_len": 4, "batch_size": 2, "seed": 0, "prefetch": 3}
    defaults["shuffle_rows"] = 1  # Documents then come out in the order in which they went in.
    return training_dataset(source, TOKENIZER, **{**defaults, **options})


def _evaluate(source, **options):
    defaults = {"vocab_size": 257, "seq_len": 4, "batch_size": 2}
    return list(evaluation_dataset(source, TOKENIZER, **{**defaults, **options}))


def _take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def _tokens(batches, name="targets"):
    return [int(t) for b in batches for t in b[name][b["segment_ids"] > 0]]


def _documents(batches):
    """Returns the texts whose end has been seen, in order."""
    data = _tokens(batches)
    ends = [i for i, token in enumerate(data) if token == EOS]
    starts = [0, *(end + 1 for end in ends)]
    return [bytes(data[a:b]).decode() for a, b in zip(starts, ends, strict=False)]


def test_packing_by_hand():
    (batch,) = _evaluate(_source("abc", "de"))
    a, b, c, d, e = b"abcde"
    expected = {
        "inputs": [[EOS, a, b, c], [EOS, d, e, 0]],
        "targets": [[a, b, c, EOS], [d, e, EOS, 0]],
        "segment_ids": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "positions": [[0, 1, 2, 3], [0, 1, 2, 0]],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}


def test_document_that_crosses_a_row_starts_a_new_segment():
    batch = _evaluate(_source("a", "bcd"), seq_len=3)[0]
    a, b, c, d = b"abcd"
    assert batch["inputs"].tolist() == [[EOS, a, EOS], [b, c, d]]
    assert batch["targets"].tolist() == [[a, EOS, b], [c, d, EOS]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2], [1, 1, 1]]
    assert batch["positions"].tolist() == [[0, 1, 0], [0, 1, 2]]


def test_evaluation_scores_every_token_once_in_order(letters):
    batches = _evaluate(letters, batch_size=5)
    assert _documents(batches) == [d["text"] for d in letters]
    np.testing.assert_array_equal(
        np.bincount(_tokens(batches), minlength=257), token_counts(TOKENIZER, letters)
    )


def test_last_evaluation_batch_is_filled_with_padding_rows():
    first, last = _evaluate(_source("abcdefgh"), seq_len=3, batch_size=2)
    assert first["segment_ids"].all()
    assert last["segment_ids"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert last["inputs"].shape == (2, 3)


def test_first_documents_only_and_units_agree():
    source = _source("ab", " ", "c d", "e")
    assert _documents(_evaluate(source, num_documents=3)) == ["ab", "c d"]
    assert count_units(source, 3) == (2, 3, 5)
    assert len(_documents(_evaluate(source, num_documents=99))) == 3


def test_blank_documents_are_skipped():
    source = _source("", "a", " \n")
    assert _documents(_evaluate(source)) == ["a"]
    assert set(_documents(_take(_train(source), 10))) == {"a"}


def test_training_covers_each_epoch_once_in_another_order(letters):
    texts = [d["text"] for d in letters]
    seen = _documents(_take(_train(letters), 60))
    first, second = seen[:23], seen[23:46]
    assert sorted(first) == sorted(second) == sorted(texts)
    assert len({tuple(texts), tuple(first), tuple(second)}) == 3


def test_order_depends_on_the_seed_alone(letters):
    def order(seed, **options):
        return _documents(_take(_train(letters, seed=seed, **options), 40))

    assert order(1) == order(1, prefetch=17)
    assert order(1) != order(2)
    # Grain's shuffle adds the epoch to its seed: a neighbouring seed must not repeat an epoch.
    assert order(1)[23:46] != order(2)[:23]
    assert order(2**40) != order(2**40 + 1)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_every_epoch(letters, count):
    parts = [
        _documents(_take(_train(letters, batch_size=6, process_index=p, process_count=count), 60))
        for p in range(count)
    ]
    # The stream of one process alone, dealt out in turn.
    whole = _documents(_take(_train(letters), 300))
    for p, part in enumerate(parts):
        assert part[:20] == whole[p::count][:20]


def test_process_batches_are_a_share_of_the_rows(letters):
    (batch,) = _take(_train(letters, batch_size=6, process_index=1, process_count=3), 1)
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ("inputs", "targets", "segment_ids", "positions"), (2, 4)
    )


def test_rows_are_shuffled_in_windows(letters):
    def rows(**options):
        batches = _take(_train(letters, **options), 12)
        return [tuple(row) for batch in batches for row in batch["inputs"].tolist()]

    in_order, shuffled = rows(), rows(shuffle_rows=8)
    assert shuffled != in_order
    for start in (0, 8, 16):
        window = slice(start, start + 8)
        assert sorted(shuffled[window]) == sorted(in_order[window])


@pytest.mark.parametrize(("seq_len", "shuffle_rows"), [(3, 1), (4, 1), (5, 1), (40, 1), (4, 7)])
def test_restored_iterator_goes_on_exactly(letters, seq_len, shuffle_rows):
    """At every step of more than two epochs, through JSON as in a checkpoint."""
    dataset = _train(letters, seq_len=seq_len, shuffle_rows=shuffle_rows)
    steps = 320 // (2 * seq_len)
    iterator = iter(dataset)
    states, batches = [], []
    for _ in range(steps):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    assert _tokens(batches).count(EOS) > 46
    for step, state in enumerate(states):
        restored = iter(dataset)
        restored.set_state(json.loads(state))
        for batch in batches[step : step + 4]:
            np.testing.assert_equal(next(restored), batch)


def test_checkpoints_by_grains_own_check(letters):
    limited = grain.experimental.LimitIterDataset(_train(letters), count=30)
    grain.experimental.assert_equal_output_after_checkpoint(limited)
    grain.experimental.assert_equal_output_after_checkpoint(
        evaluation_dataset(letters, TOKENIZER, vocab_size=257, seq_len=5, batch_size=3)
    )


def test_token_outside_the_model_is_named():
    source = _source("ab", "é")
    with pytest.raises(DataError, match=r"document doc1: token id 195; accepted: 0 to 127 "):
        evaluation_tokens = ByteTokenizer()
        evaluation_tokens.eos_id = 0
        list(evaluation_dataset(source, evaluation_tokens, vocab_size=128, seq_len=4, batch_size=1))
    with pytest.raises(DataError, match=r"document doc\d: token id 256; accepted: 0 to 255 "):
        next(iter(_train(source, vocab_size=256)))


def test_training_needs_a_document_for_each_process():
    with pytest.raises(DataError, match="2 training documents for 3 processes"):
        _train(_source("a", "b"), batch_size=3, process_count=3)


def test_batch_must_be_shared_evenly():
    with pytest.raises(DataError, match="batch_size=4: accepted: a multiple of the 3 processes"):
        _train(_source("a", "b", "c"), batch_size=4, process_count=3)


def test_source_without_text_is_an_error_not_an_endless_wait():
    with pytest.raises(DataError, match="no training document has text, of 2"):
        _train(_source("", " "))
    with pytest.raises(DataError, match="no evaluation document has text, of 1"):
        _evaluate(_source("", "a"), num_documents=1)


def test_one_document_is_enough():
    assert set(_documents(_take(_train(_source("only")), 5))) == {"only"}
