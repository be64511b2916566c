"""A byte-level BPE trained on the corpus."""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vqcx_jax.errors import DataError

EOS_TOKEN = "<|endoftext|>"
_NUM_BYTES = 256
# A pair that occurs once says nothing about the language.
_MIN_FREQUENCY = 2


def train_bpe(texts: Iterator[str], vocab_size: int) -> str:
    """Returns the JSON text of a BPE with exactly `vocab_size` tokens, <|endoftext|> the first.

    The same texts always give the same result.

    Raises:
        DataError: the texts have too few repeated pairs for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size={vocab_size}: the training text gives only {reached} "
            f"tokens; accepted: {_NUM_BYTES + 1} to {reached}, or more text"
        )
    return tokenizer.to_str()
