"""A run small enough for tests: 40 short documents, a bytes tokenizer, a model of 10k weights."""

import dataclasses
import json
import random
import struct
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorboardX.proto import event_pb2

from vqcx_jax.config import apply_overrides, schema
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.loop import TrainResult, _Run
from vqcx_jax.training.optimizer import make_optimizer, make_schedule
from vqcx_jax.training.setup import Setup, prepare
from vqcx_jax.training.state import TrainState

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
    "under",
    "some",
    "tree",
]

Event = tuple[str, int]


def write_documents(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Writes `count` documents of 3 to 20 words as JSON lines."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(3, 20))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tiny_config(directory: Path, **overrides: str) -> schema.Config:
    """A config whose corpus and cache lie in `directory`; rows and weights divide by 8 devices.

    Args:
        directory: where the documents are written.
        overrides: as on the command line, with __ for a dot: train__steps="3".
    """
    config = schema.Config(
        model=schema.Model(
            vocab_size=264,
            embed_dim=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            mlp_dim=32,
            head=schema.VQHead(num_codes=32),
        ),
        data=schema.Data(
            dataset=schema.TextFiles(path=str(write_documents(directory / "documents.jsonl"))),
            tokenizer=schema.BytesTokenizer(),
            cache_dir=str(directory / "cache"),
            seq_len=32,
            batch_size=8,
            prefetch=4,
        ),
        optimizer=schema.Optimizer(learning_rate=1e-2, warmup_steps=2),
        train=schema.Training(
            steps=6, eval_every=0, checkpoint_every=3, log_every=2, sample_tokens=0
        ),
    )
    return apply_overrides(
        config, [(name.replace("__", "."), value) for name, value in overrides.items()]
    )


def records(workdir: Path) -> list[dict[str, Any]]:
    """What a run wrote to metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def scalars(workdir: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in TensorBoard's files, in the order of writing.

    A record is a length (8 bytes), its checksum (4), the event and its checksum (4).
    """
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def random_state(
    setup: Setup, optimizer: optax.GradientTransformation | None = None, seed: int = 0
) -> TrainState:
    """Random weights, also for norms and biases, made without compiling their initialisation."""
    _, params, buffers = functional.split(abstract_model(setup.config))
    generator = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(generator.normal(0, 0.3, x.shape), x.dtype), params)
    if setup.token_map is not None:
        codes = jnp.asarray(setup.token_map.codes[:, 0])
        buffers = jax.tree.map(lambda _: codes, buffers)
    opt_state = (optimizer or tiny_optimizer(setup.config)).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, buffers, opt_state)


def tiny_optimizer(config: schema.Config) -> optax.GradientTransformation:
    """The optimizer of a resolved config."""
    schedule = make_schedule(config.optimizer, config.train.steps)
    mask = functional.decay_mask(abstract_model(config))
    return make_optimizer(config.optimizer, schedule, mask)


def save_checkpoint(config: schema.Config, workdir: Path, step: int = 1) -> TrainState:
    """Writes a checkpoint with random weights, as a run of `config` would at `step`."""
    directory = workdir / "checkpoints"
    setup = prepare(config, directory, None)
    state = dataclasses.replace(random_state(setup), step=jnp.asarray(step, jnp.int32))
    with Checkpoints(directory, config.train) as checkpoints:
        checkpoints.save(
            step, state, iter(grain.MapDataset.range(9).to_iter_dataset()), setup.to_json()
        )
    return state


@dataclasses.dataclass
class FinishedRun:
    """What one run left behind.

    Attributes:
        run: its parts; the state is that after the last step.
        initial: host copies of the first parameters.
        events: ("dispatch", step) and ("report", step) in the order in which they happened.
    """

    config: schema.Config
    workdir: Path
    run: _Run
    initial: dict[str, Any]
    events: list[Event]
    result: TrainResult
