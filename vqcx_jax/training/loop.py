"""The training run: from a config and a directory to a checkpoint, a perplexity and a sample."""

import dataclasses
import math
from pathlib import Path

import grain
import jax

from vqcx_jax import checkpoint, data
from vqcx_jax.config import resolve_mesh_shape, schema, validate
from vqcx_jax.errors import NonFiniteLossError
from vqcx_jax.evaluation.perplexity import SplitLoss, make_eval_step, split_loss
from vqcx_jax.evaluation.sample import sample_text
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.paths import check_directory
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training.batches import to_microbatches
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.interrupt import StopSignal
from vqcx_jax.training.optimizer import make_optimizer, make_schedule
from vqcx_jax.training.reporting import Reporter
from vqcx_jax.training.setup import Setup, prepare
from vqcx_jax.training.state import abstract_state, init_state, state_shardings
from vqcx_jax.training.step import make_train_step
from vqcx_jax.training.summary import run_summary


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: steps done; fewer than `config.train.steps` when a signal stopped the run.
        checkpoint: directory of the checkpoint of that step.
        validation: loss on the validation split (its first `final_eval_batches`); None if stopped.
        sample: generated text; empty if stopped or not asked for.
        stopped_by: the signal that stopped the run early.
    """

    step: int
    checkpoint: Path
    validation: SplitLoss | None = None
    sample: str = ""
    stopped_by: int | None = None


def train(config: schema.Config, workdir: Path) -> TrainResult:
    """Trains, or goes on with the newest checkpoint in `workdir`.

    Stopped after any step and started again, a run has the losses of an uninterrupted one, bit
    for bit (same machine, same software).

    Args:
        workdir: gets checkpoints/, metrics.jsonl and tensorboard/.

    Raises:
        UserError: a config, corpus, tokenizer or checkpoint that cannot be used.
        NonFiniteLossError: the loss, its gradient or the weights became NaN or infinite.
    """
    validate(config)
    check_directory("workdir", workdir)
    mesh_shape = resolve_mesh_shape(config.mesh, jax.device_count())
    mesh = make_mesh(mesh_shape, config.mesh.axis_type)
    directory = (workdir / "checkpoints").absolute()
    setup = prepare(config, directory, max(checkpoint.steps(directory), default=None))
    with jax.set_mesh(mesh), Checkpoints(directory, config.train) as checkpoints:
        return _Run(setup, mesh, checkpoints).execute(workdir)


class _Run:
    """The parts that the loop needs at hand."""

    def __init__(self, setup: Setup, mesh: jax.sharding.Mesh, checkpoints: Checkpoints):
        config = setup.config
        model = abstract_model(config)
        graphdef, _, _ = functional.split(model)
        schedule = make_schedule(config.optimizer, config.train.steps)
        optimizer = make_optimizer(config.optimizer, schedule, functional.decay_mask(model))
        shardings = state_shardings(model, optimizer, mesh, config.sharding)
        self.setup = setup
        self.config = config
        self.mesh = mesh
        self.checkpoints = checkpoints
        self.batches = iter(_training_batches(setup))
        self.train_step = make_train_step(
            graphdef, optimizer, schedule, z_loss=config.train.z_loss, shardings=shardings
        )
        self.eval_step = make_eval_step(graphdef)
        if checkpoints.latest_step is None:
            self.state = init_state(config, setup.token_map, optimizer, shardings)
        else:
            abstract = abstract_state(config, optimizer, shardings)
            self.state = checkpoints.restore(checkpoints.latest_step, abstract, self.batches)

    def execute(self, workdir: Path) -> TrainResult:
        step = start = int(self.state.step)
        settings = self.config.train
        unread: dict[str, jax.Array] | None = None
        if jax.process_index() == 0:
            print(run_summary(self.setup, self.state, self.mesh))
        with Reporter(workdir, self.config, start) as reporter, StopSignal() as stop:
            for step in range(start + 1, settings.steps + 1):
                # Here and not after the step, so that a run stopped after it does it too.
                if self._evaluation_is_due(step - 1):
                    self._evaluate(reporter, step - 1, settings.eval_batches)
                batch = to_microbatches(
                    next(self.batches), settings.grad_accumulation, self.mesh, self.config.sharding
                )
                self.state, metrics = self.train_step(self.state, batch)
                # Reading a metric waits for its step. The previous step's are read now, while
                # the devices are busy with this one.
                self._report(reporter, step - 1, unread)
                unread = metrics
                stopped_by = stop.received(step) if step < settings.steps else None
                saving = stopped_by or step == settings.steps or self.checkpoints.is_due(step)
                if saving or self._evaluation_is_due(step):
                    self._report(reporter, step, unread)
                    unread = None
                if saving:
                    self.checkpoints.save(step, self.state, self.batches, self.setup.to_json())
                    reporter.restart_clock()
                if stopped_by:
                    path = self.checkpoints.directory / str(step)
                    return TrainResult(step, path, stopped_by=stopped_by)
            validation = self._evaluate(reporter, step, settings.final_eval_batches)
        return TrainResult(step, self.checkpoints.directory / str(step), validation, self._sample())

    def _report(self, reporter: Reporter, step: int, metrics: dict[str, jax.Array] | None) -> None:
        if metrics is None:
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # A finite loss can still make gradients or weights that are not: no such state is saved.
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            last = self.checkpoints.latest_step
            where = "there is none" if last is None else self.checkpoints.directory / str(last)
            raise NonFiniteLossError(
                f"{', '.join(wrong)} at step {step}; last good checkpoint: {where}"
            )
        reporter.step(step, values)

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step > 0 and every > 0 and step % every == 0

    def _evaluate(self, reporter: Reporter, step: int, max_batches: int | None) -> SplitLoss:
        config = self.config
        # Microbatches, as in training: they are what fits. `max_batches` counts whole batches.
        microbatches = config.train.grad_accumulation
        batches = data.evaluation_dataset(
            self.setup.corpus.split("validation"),
            self.setup.tokenizer,
            vocab_size=config.model.known_vocab_size(),
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size // microbatches,
        )
        result = split_loss(
            self.eval_step,
            self.state.params,
            self.state.buffers,
            batches,
            self.mesh,
            config.sharding,
            max_batches=None if max_batches is None else max_batches * microbatches,
        )
        reporter.evaluation(step, {"loss": result.per_token, "perplexity": result.perplexity})
        return result

    def _sample(self) -> str:
        settings = self.config.train
        if settings.sample_tokens == 0:
            return ""
        return sample_text(
            self.config,
            self.state.params,
            self.state.buffers,
            self.setup.tokenizer,
            settings.sample_prompt,
            settings.sample_tokens,
            seed=settings.seed,
            temperature=0.8,
        )


def _training_batches(setup: Setup) -> grain.IterDataset:
    config = setup.config
    return data.training_dataset(
        setup.corpus.split("train"),
        setup.tokenizer,
        vocab_size=config.model.known_vocab_size(),
        seq_len=config.data.seq_len,
        batch_size=config.data.batch_size,
        seed=config.data.shuffle_seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        shuffle_rows=config.data.shuffle_rows,
        prefetch=config.data.prefetch,
    )
