"""Turns a recipe into a corpus on disk: one tensorflow-datasets builder for all recipes.

The documents are kept as ArrayRecord under `<directory>/<name>/<fingerprint>/<version>`, in the
order that TFDS gives them: fixed, but pseudo-random, so that the first n are a fair sample.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from vqcx_jax.data.corpora.base import Corpus, Document, Recipe, Records, is_blank
from vqcx_jax.data.corpora.quiet import quiet_tfds
from vqcx_jax.errors import DataError

# Goes up when the stored form changes.
_VERSION = tfds.core.Version("1.0.0")


class _RecipeBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # TFDS has no type stubs.
):
    """Stores the documents of a recipe; the recipe's fingerprint is the dataset's config."""

    VERSION = _VERSION

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.name = recipe.name
        self._recipe = recipe
        config = tfds.core.BuilderConfig(name=recipe.fingerprint, version=_VERSION)
        super().__init__(data_dir=directory, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "name": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Document]]]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._recipe.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Document]]:
        count = 0
        for document in self._recipe.splits[split]():
            if not is_blank(document):
                yield count, document
                count += 1
        if count == 0:
            raise DataError(f"the {split} split of {self._recipe.name} has no documents")


def prepare(recipe: Recipe, directory: Path) -> Corpus:
    """Returns the corpus of a recipe, storing it in `directory` if it is not there yet.

    Interrupted preparation leaves no corpus: it is written beside its place and then renamed.
    Several processes may prepare the same corpus at once: the first to finish wins.

    Raises:
        DataError: a split has no documents, or what the recipe's generators raise.
    """
    with quiet_tfds():
        builder = _RecipeBuilder(recipe, directory)
        if not builder.is_prepared():
            try:
                builder.download_and_prepare()
            except OSError:
                # The final rename fails when another process was first.
                if not builder.data_path.exists():
                    raise
            builder = _RecipeBuilder(recipe, directory)
    sources = {
        split: Records(builder.as_data_source(split), split, name_field="name")
        for split in recipe.splits
    }
    return Corpus(recipe.name, recipe.fingerprint, sources)
