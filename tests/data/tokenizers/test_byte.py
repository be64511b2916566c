from vqcx_jax.data.tokenizers.byte import ByteTokenizer


def test_ids_are_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert list(tokenizer.encode("aé\n")) == [97, 195, 169, 10]


def test_any_text_comes_back_and_broken_characters_are_shown():
    tokenizer = ByteTokenizer()
    text = "漢字\r\n\t🙂 \x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([195, 256, 97]) == "\ufffda"
