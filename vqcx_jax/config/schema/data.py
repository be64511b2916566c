"""Text, tokenizers and batches."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vqcx_jax.config.schema.types import STRICT, NonNegative, OpenFraction, Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PythonStdlib:
    """Source files of the running interpreter's standard library: real text, no network."""

    kind: Literal["python_stdlib"] = "python_stdlib"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextFiles:
    """A file, directory or glob of .txt (one document a file) or .jsonl (one document a line)."""

    kind: Literal["text_files"] = "text_files"
    path: str = ""
    # None: `validation_fraction` of the documents of `path` are held out.
    validation_path: str | None = None
    validation_fraction: OpenFraction = 0.05
    text_field: str = "text"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WikiText:
    """WikiText, word-level tokens, one article a document."""

    kind: Literal["wikitext2", "wikitext103"] = "wikitext2"
    # A directory with the train, validation and test files. None: downloaded.
    path: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TFDS:
    """A prepared tensorflow-datasets dataset: by name ("c4/en", "lm1b") or by directory."""

    kind: Literal["tfds"] = "tfds"
    name: str | None = None
    path: str | None = None
    text_field: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BytesTokenizer:
    """One token per UTF-8 byte, plus an end-of-document token: V = 257."""

    kind: Literal["bytes"] = "bytes"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WordTokenizer:
    """White-space words of the training split; a line end is the token <eos>."""

    kind: Literal["word"] = "word"
    # None: every word type of the training split.
    max_vocab_size: Positive | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BPETokenizer:
    """A byte-level BPE trained on the first `train_documents` training documents, and cached."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    train_documents: Positive = 20_000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JSONTokenizer:
    """A Hugging Face `tokenizers` JSON file (may be gzipped)."""

    kind: Literal["json"] = "json"
    path: str = ""
    # The end-of-document token. None: <|endoftext|>, </s> or the like, whichever the file has.
    eos_token: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SentencePieceTokenizer:
    """A SentencePiece .model file."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    path: str = ""


Dataset = PythonStdlib | TextFiles | WikiText | TFDS
Tokenizer = BytesTokenizer | WordTokenizer | BPETokenizer | JSONTokenizer | SentencePieceTokenizer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Which text, how it becomes tokens, and how tokens become batches."""

    dataset: Dataset = Field(default_factory=PythonStdlib, discriminator="kind")
    tokenizer: Tokenizer = Field(default_factory=BPETokenizer, discriminator="kind")
    # Where prepared corpora and trained tokenizers are kept. None: ~/.cache/vqcx_jax.
    cache_dir: str | None = None
    seq_len: Positive = 256
    # Rows of seq_len tokens per optimizer step, over all processes and microbatches.
    batch_size: Positive = 16
    shuffle_seed: NonNegative = 0
    # Tokens of the training text, from its start on, in which tokens and their neighbours are
    # counted, for heads that need it. None: all, which have to fit into memory.
    count_tokens: Positive | None = 20_000_000
    # Packed rows of one process that are shuffled together, so that a batch mixes documents.
    shuffle_rows: Positive = 1024
    # Documents that the loader reads ahead.
    prefetch: Positive = 64
