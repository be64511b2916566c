import gzip
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vqcx_jax.data.tokenizers.hugging_face import load_json_tokenizer
from vqcx_jax.errors import DataError


def _file(tmp_path, *special):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", *special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    tokenizer.enable_truncation(2)
    path = tmp_path / "t.json"
    tokenizer.save(str(path))
    return path


def test_file_is_read_and_adds_and_cuts_nothing(tmp_path):
    tokenizer = load_json_tokenizer(str(_file(tmp_path, "</s>")), None)
    assert list(tokenizer.encode("a b z a")) == [1, 2, 0, 1]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (4, 5)


def test_gzipped_file(tmp_path):
    path = _file(tmp_path, "</s>")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert load_json_tokenizer(str(path), None).eos_id == 4


def test_named_end_token_wins(tmp_path):
    path = str(_file(tmp_path, "</s>", "<stop>"))
    assert load_json_tokenizer(path, "<stop>").eos_id == 5


def test_vocabulary_with_holes_has_room_for_every_id(tmp_path):
    path = _file(tmp_path, "</s>")
    data = json.loads(path.read_text())
    data["model"]["vocab"]["c"] = 90
    path.write_text(json.dumps(data))
    tokenizer = load_json_tokenizer(str(path), None)
    assert tokenizer.encode("c")[0] < tokenizer.vocab_size


def test_unknown_end_token_lists_the_special_ones(tmp_path):
    path = str(_file(tmp_path, "<stop>"))
    with pytest.raises(DataError, match=r"eos_token; special tokens: <s>, <stop>"):
        load_json_tokenizer(path, None)
    with pytest.raises(DataError, match=r"eos_token='</s>'.*special tokens: <s>, <stop>"):
        load_json_tokenizer(path, "</s>")


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b"\x1f\x8b broken", None])
def test_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.tokenizer\.path='.*t\.json'"):
        load_json_tokenizer(str(path), None)
