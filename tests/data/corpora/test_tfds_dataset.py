import json

import pytest
import tensorflow_datasets as tfds

from vqcx_jax.config import schema
from vqcx_jax.data.corpora import open_corpus
from vqcx_jax.data.corpora.quiet import quiet_tfds
from vqcx_jax.errors import DataError


class SmallWeb(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Made up."""

    VERSION = tfds.core.Version("1.2.0")
    name = "small_web"

    def _info(self):
        features = {"body": tfds.features.Text(), "url": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "dev": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"body": f"page {i} é", "url": "here"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    with quiet_tfds():
        SmallWeb(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def _open(tmp_path, **options):
    options = {"text_field": "body", "validation_split": "dev", **options}
    return open_corpus(schema.TFDS(**options), tmp_path)


def test_read_by_directory(tmp_path, data_dir):
    corpus = _open(tmp_path, path=str(data_dir / "small_web" / "1.2.0"))
    assert set(corpus.splits) == {"train", "validation"}
    assert sorted(d["text"] for d in corpus.split("validation")) == [
        f"page {i} é" for i in range(3)
    ]
    assert corpus.split("train")[4]["name"] == "train[4]"


def test_read_by_name(tmp_path, data_dir):
    tfds.core.add_data_dir(str(data_dir))
    assert len(_open(tmp_path, name="small_web").split("train")) == 20


def test_split_may_be_a_slice_and_changes_the_fingerprint(tmp_path, data_dir):
    path = str(data_dir / "small_web" / "1.2.0")
    corpus = _open(tmp_path, path=path, validation_split="train[75%:]")
    assert len(corpus.split("validation")) == 5
    assert corpus.fingerprint != _open(tmp_path, path=path).fingerprint


def test_unprepared_dataset_names_the_command(tmp_path):
    with pytest.raises(
        DataError, match="tfds build irc_disentanglement --file_format=array_record"
    ):
        _open(tmp_path, name="irc_disentanglement")


def test_other_file_format_is_refused(tmp_path, data_dir):
    info = json.loads((data_dir / "small_web" / "1.2.0" / "dataset_info.json").read_text())
    features = (data_dir / "small_web" / "1.2.0" / "features.json").read_text()
    (tmp_path / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    (tmp_path / "features.json").write_text(features)
    with pytest.raises(DataError, match="array_record.*tfrecord"):
        _open(tmp_path, path=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "accepted: exactly one of them"),
        ({"path": "here", "name": "there"}, "accepted: exactly one of them"),
        ({"path": "/no/such"}, r"data\.dataset\.path='/no/such': .*dataset_info\.json"),
        ({"name": "no_such_dataset"}, r"data\.dataset\.name='no_such_dataset'"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        _open(tmp_path, **options)


def test_bad_field_and_slice_are_named(tmp_path, data_dir):
    path = str(data_dir / "small_web" / "1.2.0")
    with pytest.raises(DataError, match="text_field='text': .*the fields .*body"):
        _open(tmp_path, path=path, text_field="text")
    with pytest.raises(DataError, match=r"split 'train\[x\]' of small_web"):
        _open(tmp_path, path=path, train_split="train[x]")
