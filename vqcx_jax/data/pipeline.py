"""Documents to batches of packed sequences.

A document of tokens t1..tn is the inputs [eos, t1..tn] and the targets [t1..tn, eos]: every
token and the end are scored once. Documents follow each other and are cut every `seq_len`
tokens. `segment_ids` number the pieces of a row from 1 (0 is padding) and `positions` start
again from 0 in every piece, so that attention sees no other document and nothing before the cut.
"""

from functools import partial
from typing import Any

import grain
import numpy as np

from vqcx_jax.data.corpora import Document, Source, is_blank
from vqcx_jax.data.packing import ConcatThenSplit
from vqcx_jax.data.tokenizers import Tokenizer
from vqcx_jax.errors import DataError

_EVALUATION_PREFETCH = 16


def training_dataset(
    source: Source,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle_rows: int = 1024,
    prefetch: int = 64,
) -> grain.IterDataset:
    """Returns endless shuffled batches of one process.

    Every epoch has another order, which is a function of `seed` alone; process p gets every
    `process_count`-th document of it. A long document fills many rows in succession, so rows are
    shuffled once more, among `shuffle_rows` of them: a batch then mixes documents. The iterator's
    state is small and exact: after `set_state` the next batch is the one that would have come.

    Args:
        source: the training documents.
        tokenizer: gives the tokens.
        vocab_size: the model's.
        seq_len: tokens in a row.
        batch_size: rows in a batch of all processes together.
        seed: decides the order.
        process_index: this process.
        process_count: the number of processes.
        shuffle_rows: rows of one process that are shuffled together; 1: none.
        prefetch: documents read ahead by one background thread.

    Returns:
        Batches {inputs, targets, segment_ids, positions}, each
        int32[batch_size // process_count, seq_len].

    Raises:
        DataError: there are too few documents, or `batch_size` cannot be shared; while
            iterating: a token is not in the model's vocabulary.
    """
    if batch_size % process_count:
        raise DataError(
            f"data.batch_size={batch_size}: accepted: a multiple of the {process_count} processes"
        )
    if len(source) < process_count:
        raise DataError(
            f"{len(source)} training documents for {process_count} processes; "
            "accepted: one for each process or more"
        )
    _require_text(source, "training", len(source))
    # Sharding the endless stream, not the source: all processes stay in the same epoch.
    documents = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    rows = _pack(
        documents[process_index::process_count],
        tokenizer,
        vocab_size=vocab_size,
        seq_len=seq_len,
        prefetch=prefetch,
    )
    rows_per_batch = batch_size // process_count
    # Grain adds the window's number to this seed, in 32 bits.
    shuffled = grain.experimental.WindowShuffleIterDataset(
        rows, window_size=shuffle_rows, seed=seed % 2**31
    )
    batches = shuffled.batch(rows_per_batch, drop_remainder=True)
    # The shuffle takes in all its rows at once: a thread that is one such window of batches ahead
    # keeps the trainer from waiting for it.
    ahead = -(-shuffle_rows // rows_per_batch) + 1
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead)


def evaluation_dataset(
    source: Source,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    seq_len: int,
    batch_size: int,
    num_documents: int | None = None,
) -> grain.IterDataset:
    """Returns batches with every document once, in order, the same in every process.

    Args:
        source: the documents.
        tokenizer: gives the tokens.
        vocab_size: the model's.
        seq_len: tokens in a row.
        batch_size: rows in a batch; the last batch is filled up with padding.
        num_documents: take only the first so many.

    Returns:
        Batches {inputs, targets, segment_ids, positions}, each int32[batch_size, seq_len].

    Raises:
        DataError: there are no documents; while iterating: a token is not in the model's
            vocabulary.
    """
    count = len(source) if num_documents is None else min(num_documents, len(source))
    _require_text(source, "evaluation", count)
    rows = _pack(
        grain.MapDataset.source(source)[:count],
        tokenizer,
        vocab_size=vocab_size,
        seq_len=seq_len,
        prefetch=_EVALUATION_PREFETCH,
    )
    fill = partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return rows.batch(batch_size, drop_remainder=False, batch_fn=fill)


def _pack(
    documents: grain.MapDataset,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    seq_len: int,
    prefetch: int,
) -> grain.IterDataset:
    """Returns rows of `seq_len` tokens."""
    examples = documents.filter(lambda document: not is_blank(document)).map(
        partial(_tokenize, tokenizer=tokenizer, vocab_size=vocab_size)
    )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    packed = ConcatThenSplit(
        examples.to_iter_dataset(options),
        length_struct={"inputs": seq_len, "targets": seq_len},
    )
    return packed.map(_name_features)


def _tokenize(document: Document, *, tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    tokens = np.pad(tokenizer.encode(document["text"]), 1, constant_values=tokenizer.eos_id)
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        raise DataError(
            f"document {document['name']}: token id {tokens[outside][0]}; "
            f"accepted: 0 to {vocab_size - 1} (the model's vocab_size is {vocab_size})"
        )
    return {"inputs": tokens[:-1], "targets": tokens[1:]}


def _name_features(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "inputs": packed["inputs"],
        "targets": packed["targets"],
        "segment_ids": packed["inputs_segment_ids"],
        "positions": packed["inputs_positions"],
    }


def _require_text(source: Source, purpose: str, count: int) -> None:
    if all(is_blank(source[i]) for i in range(count)):
        raise DataError(f"no {purpose} document has text, of {count}; accepted: one or more")
