import pytest
import sentencepiece

from vqcx_jax.data.tokenizers.sentence_piece import load_sentencepiece
from vqcx_jax.errors import DataError


def _train(tmp_path, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "the dog sat on the cat"]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return str(tmp_path / "m.model")


def test_end_of_sentence_piece_ends_documents(tmp_path):
    tokenizer = load_sentencepiece(_train(tmp_path, eos_id=1, bos_id=2))
    assert tokenizer.eos_id == 1
    assert not {1, 2} & set(tokenizer.encode("the cat").tolist())


def test_model_without_end_is_refused(tmp_path):
    with pytest.raises(DataError, match="no end-of-sentence piece"):
        load_sentencepiece(_train(tmp_path, eos_id=-1))


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.tokenizer\.path='.*x\.model'"):
        load_sentencepiece(str(path))
