"""Where the numbers of a run go: a progress bar, metrics.jsonl and TensorBoard."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import tensorboardX
import tqdm

from vqcx_jax.config import schema
from vqcx_jax.training.flops import peak_flops, train_flops_per_token


class Reporter:
    """Reports training from process 0; on other processes it does nothing.

    metrics.jsonl has one object a step with full float precision, and one for each evaluation;
    "time" is seconds since 1970, when the numbers were read.
    """

    def __init__(self, workdir: Path, config: schema.Config, start_step: int):
        self._log_every = config.train.log_every
        self._steps = config.train.steps
        self._flops_per_token = train_flops_per_token(config.model, config.data.seq_len)
        device_peak = config.train.peak_flops or peak_flops(jax.devices()[0])
        self._peak = device_peak and device_peak * jax.device_count()
        self._is_writer = jax.process_index() == 0
        if not self._is_writer:
            return
        path = workdir / "metrics.jsonl"
        _drop_later_records(path, start_step)
        self._metrics = path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1
        )
        self._bar = tqdm.tqdm(
            total=config.train.steps, initial=start_step, unit="step", dynamic_ncols=True
        )
        self._compiled = False
        self.restart_clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_writer:
            self._bar.close()
            self._metrics.close()
            self._tensorboard.close()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Records one training step; tokens/s is over the steps since the last report."""
        if not self._is_writer:
            return
        self._write({"step": step, **metrics})
        self._bar.update()
        shown = {"loss": f"{metrics['loss']:.3f}"}
        if not self._compiled:  # The first step's time is the compiler's.
            self._compiled = True
            self._bar.set_postfix(shown)
            self.restart_clock()
            return
        self._window_tokens += metrics["tokens"]
        if step % self._log_every and step != self._steps:
            return
        speed = self._window_tokens / (time.perf_counter() - self._window_start)
        self.restart_clock()
        scalars = {**metrics, "tokens_per_second": speed}
        shown["tokens/s"] = f"{speed:,.0f}"
        if self._peak:
            scalars["mfu"] = speed * self._flops_per_token / self._peak
            shown["MFU"] = f"{scalars['mfu']:.1%}"
        self._bar.set_postfix(shown)
        for name, value in scalars.items():
            self._tensorboard.add_scalar(f"train/{name}", value, step)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Records a validation result."""
        if not self._is_writer:
            return
        self._write({"step": step, **{f"validation_{k}": v for k, v in metrics.items()}})
        for name, value in metrics.items():
            self._tensorboard.add_scalar(f"validation/{name}", value, step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._bar.write(f"step {step}: validation {shown}")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of tokens/s the time since the last report (evaluation, checkpoints)."""
        if self._is_writer:
            self._window_start, self._window_tokens = time.perf_counter(), 0.0

    def _write(self, record: dict[str, float]) -> None:
        self._metrics.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        self._metrics.flush()


def _drop_later_records(path: Path, last_step: int) -> None:
    """Removes what an interrupted run wrote after the checkpoint that is now resumed.

    The evaluation of the checkpoint itself comes after it, too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # The run ended in the middle of a line.
            break
        if record["step"] < last_step or (record["step"] == last_step and "loss" in record):
            kept.append(line + "\n")
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept), "utf-8")
    replacement.replace(path)
