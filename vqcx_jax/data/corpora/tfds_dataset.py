"""Datasets that were prepared with tensorflow-datasets, such as C4 and LM1B."""

import os
from typing import Any

import tensorflow_datasets as tfds

from vqcx_jax.config import schema
from vqcx_jax.data.corpora.base import Corpus, Records, fingerprint
from vqcx_jax.data.corpora.quiet import quiet_tfds
from vqcx_jax.errors import DataError

_FILE_FORMAT = "array_record"


def open_tfds(dataset: schema.TFDS) -> Corpus:
    """Opens a prepared dataset by directory or by name; prepares nothing.

    Raises:
        DataError: not exactly one of `path` and `name` is given, the dataset is unknown, not
            prepared or not stored as ArrayRecord, or it has no text field of that name.
    """
    if (dataset.path is None) == (dataset.name is None):
        raise DataError(
            f"data.dataset.path={dataset.path!r} and data.dataset.name={dataset.name!r}: "
            "accepted: exactly one of them"
        )
    builder = _builder(dataset)
    if dataset.text_field not in builder.info.features:
        raise DataError(
            f"data.dataset.text_field={dataset.text_field!r}: {builder.info.full_name} has "
            f"the fields {', '.join(builder.info.features)}"
        )
    names = {
        "train": dataset.train_split,
        "validation": dataset.validation_split,
        "test": dataset.test_split,
    }
    # A name may be a TFDS slice such as "train[99%:]".
    present = {k: v for k, v in names.items() if v.split("[")[0] in builder.info.splits}
    shards = {name: list(info.shard_lengths) for name, info in builder.info.splits.items()}
    options = {
        "dataset": builder.info.full_name,
        "bytes": builder.info.dataset_size,
        "shards": shards,
        "splits": present,
        "text_field": dataset.text_field,
    }
    return Corpus(
        name=builder.info.full_name,
        fingerprint=fingerprint(options, ()),
        splits={
            split: Records(_data_source(builder, name), split, dataset.text_field)
            for split, name in present.items()
        },
    )


def _data_source(builder: Any, split: str) -> Any:
    try:
        return builder.as_data_source(split)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"split {split!r} of {builder.info.full_name}: {str(error).splitlines()[0]}; "
            "accepted: a split or a TFDS slice of one"
        ) from None


def _builder(dataset: schema.TFDS) -> Any:
    """Returns the builder of a dataset whose ArrayRecord files are there."""
    try:
        with quiet_tfds():
            if dataset.path is not None:
                path = os.path.expanduser(dataset.path)
                builder = tfds.builder_from_directory(path, file_format=_FILE_FORMAT)
            else:
                builder = tfds.builder(dataset.name, file_format=_FILE_FORMAT)
            problem = None if builder.is_prepared() else "not prepared"
    except (OSError, ValueError, tfds.core.DatasetNotFoundError) as error:
        problem = str(error).splitlines()[0].rstrip(".")
    if problem is None:
        return builder
    if dataset.path is not None:
        raise DataError(
            f"data.dataset.path={dataset.path!r}: {problem}; accepted: a directory that has "
            f"dataset_info.json and {_FILE_FORMAT} files, as `tfds build` makes"
        )
    raise DataError(
        f"data.dataset.name={dataset.name!r}: {problem}; accepted: a dataset prepared in "
        "TFDS_DATA_DIR (~/tensorflow_datasets if unset) with: "
        f"tfds build {dataset.name} --file_format={_FILE_FORMAT}"
    )
