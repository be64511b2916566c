"""Text: corpora, tokenizers and the pipeline that makes batches."""

from vqcx_jax.data.cache import cache_directory
from vqcx_jax.data.corpora import Corpus, Document, Source, open_corpus, open_text
from vqcx_jax.data.counts import (
    Units,
    cached_token_counts,
    count_units,
    encoded_documents,
    token_counts,
)
from vqcx_jax.data.pipeline import evaluation_dataset, training_dataset
from vqcx_jax.data.tokenizers import (
    Tokenizer,
    build_tokenizer,
    tokenizer_fingerprint,
    tokenizer_from_json,
)

__all__ = [
    "Corpus",
    "Document",
    "Source",
    "Tokenizer",
    "Units",
    "build_tokenizer",
    "cache_directory",
    "cached_token_counts",
    "count_units",
    "encoded_documents",
    "evaluation_dataset",
    "open_corpus",
    "open_text",
    "token_counts",
    "tokenizer_fingerprint",
    "tokenizer_from_json",
    "training_dataset",
]
