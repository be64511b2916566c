"""Reading checkpoints. One Orbax step directory holds all that a run needs to go on.

model      parameters and buffers (the token map among them)
optimizer  optimizer state and step
data       position of the data iterator, one file a process
run        JSON: the resolved config, the tokenizer, the corpus
"""

import contextlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from vqcx_jax.errors import CheckpointError
from vqcx_jax.nn.functional import Tree


def orbax_context() -> ocp.Context:
    """How every checkpoint here is read and written: "run" as a JSON file."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="run")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, rising; none if there is no directory."""
    return sorted(
        int(entry.name)
        for entry in (directory.iterdir() if directory.is_dir() else ())
        if entry.name.isdigit() and ocp.is_orbax_checkpoint(entry)
    )


def locate(path: Path, step: int | None = None) -> tuple[Path, int]:
    """The checkpoint that a user means: the directory of all steps, and the step.

    Args:
        path: a run's workdir, its checkpoints directory, or one step's directory.
        step: None for the newest (or for the one that `path` names).

    Raises:
        CheckpointError: no checkpoint there, or not that one.
    """
    path = path.absolute()
    if step is None and path.name.isdigit() and ocp.is_orbax_checkpoint(path):
        return path.parent, int(path.name)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = steps(directory)
    if not found:
        raise CheckpointError(f"checkpoint={str(path)!r}: no checkpoint found there")
    if step is not None and step not in found:
        raise CheckpointError(f"step={step}: {str(directory)!r} has the steps {found}")
    return directory, found[-1] if step is None else step


def load_run(directory: Path, step: int) -> dict[str, Any]:
    """The JSON of a checkpoint: its resolved config and tokenizer.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = directory / str(step)
    with _reading(path):
        return ocp.load_checkpointables(path, {"run": None})["run"]


def load_model(directory: Path, step: int, model: Tree) -> Tree:
    """Parameters and buffers alone, laid out as the abstract {"params", "buffers"} `model`.

    Raises:
        CheckpointError: weights of another architecture; names every one of them.
    """
    path = directory / str(step)
    check_architecture(path, model)
    with orbax_context():
        return ocp.load_checkpointables(path, {"model": model})["model"]


def load_parameter(directory: Path, step: int, name: str) -> np.ndarray:
    """One array of the parameters, "head/weights" for example, and nothing else of them.

    Raises:
        CheckpointError: it cannot be read, or has no such parameter.
    """
    name = f"params/{name}"
    arrays = load_arrays(directory, step, {name})
    if name not in arrays:
        path = directory / str(step)
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: no array {name!r}")
    return arrays[name]


def load_arrays(directory: Path, step: int, names: Set[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that are there, "buffers/head/assignment" for example.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = directory / str(step)
    with _reading(path):
        saved = ocp.metadata(path, checkpointable_name="model").metadata
        wanted = jax.tree_util.tree_map_with_path(
            lambda at, x: np.empty(x.shape, x.dtype) if _name(at) in names else ocp.PLACEHOLDER,
            saved,
        )
        loaded = ocp.load_checkpointables(path, {"model": wanted})["model"]
    leaves = jax.tree_util.tree_leaves_with_path(loaded)
    return {_name(at): x for at, x in leaves if _name(at) in names}


def check_architecture(path: Path, model: Tree) -> None:
    """Raises CheckpointError naming every weight that differs between a checkpoint and `model`."""
    with _reading(path):
        saved = _shapes(ocp.metadata(path, checkpointable_name="model").metadata)
    wanted = _shapes(model)
    problems = [
        f"{name}: {saved.get(name, 'none')} in the checkpoint, {wanted.get(name, 'none')} "
        "in the model"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is of another architecture: {'; '.join(problems)}"
        )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with orbax_context():
            yield
    except (OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {reason}") from error


def _shapes(tree: Any) -> dict[str, str]:
    return {
        _name(path): f"{np.dtype(x.dtype)}{x.shape}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
