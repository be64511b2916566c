"""Keeps tensorflow-datasets from writing to the terminal."""

import contextlib
import io
import logging
from collections.abc import Iterator

import tensorflow_datasets as tfds


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Suppresses progress bars, announcements on stdout and absl messages below ERROR."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
