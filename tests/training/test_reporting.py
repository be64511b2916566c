"""What a run writes besides its checkpoints."""

import struct
from pathlib import Path

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event
from tiny_run import FinishedRun, records, tiny_config

from vqcx_jax.config import schema
from vqcx_jax.training.flops import train_flops_per_token
from vqcx_jax.training.reporting import Reporter

METRICS = {"loss": 1.5, "tokens": 100.0}


def scalars(workdir: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in TensorBoard's files, in the order of writing.

    A record is a length (8 bytes), its checksum (4), the event and its checksum (4).
    """
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


@pytest.fixture
def config(tmp_path: Path) -> schema.Config:
    return tiny_config(tmp_path, train__steps="5", train__log_every="2")


def test_metrics_have_every_bit(config: schema.Config, tmp_path: Path) -> None:
    with Reporter(tmp_path, config, 0) as reporter:
        reporter.step(1, {"loss": 1 / 3, "tokens": 100.0})
        reporter.evaluation(1, {"loss": 2 / 3})
    first, second = records(tmp_path)
    assert first["step"] == 1 and first["loss"] == 1 / 3 and first["tokens"] == 100.0
    assert second["step"] == 1 and second["validation_loss"] == 2 / 3


def test_metrics_are_on_disk_after_each_step(config: schema.Config, tmp_path: Path) -> None:
    with Reporter(tmp_path, config, 0) as reporter:
        for step in (1, 2):
            reporter.step(step, METRICS)
            assert records(tmp_path)[-1]["step"] == step


def test_going_on_drops_what_came_after_the_checkpoint(
    config: schema.Config, tmp_path: Path
) -> None:
    with Reporter(tmp_path, config, 0) as reporter:
        for step in range(1, 5):
            reporter.step(step, METRICS)
            reporter.evaluation(step, {"loss": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with Reporter(tmp_path, config, 2):
        # The evaluation of step 2 is made again, from the checkpoint.
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:3]


def test_going_on_after_a_line_that_was_cut_short(config: schema.Config, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with Reporter(tmp_path, config, 1) as reporter:
        reporter.step(2, METRICS)
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_tensorboard_has_every_log_every_th_step_and_the_last(
    config: schema.Config, tmp_path: Path
) -> None:
    with Reporter(tmp_path, config, 0) as reporter:
        for step in range(1, 6):
            reporter.step(step, {"loss": step / 4, "tokens": 100.0})
        reporter.evaluation(5, {"perplexity": 7.0})
    found = scalars(tmp_path)
    assert [(s, v) for tag, s, v in found if tag == "train/loss"] == [(2, 0.5), (4, 1), (5, 1.25)]
    assert ("validation/perplexity", 5, 7.0) in found
    assert {tag for tag, _, _ in found} == {
        "train/loss",
        "train/tokens",
        "train/tokens_per_second",
        "validation/perplexity",
    }


def test_progress_bar(
    config: schema.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter(tmp_path, config, 3) as reporter:
        reporter.step(4, METRICS)
        reporter.evaluation(4, {"loss": 2.0, "perplexity": 7.3890561})
    captured = capsys.readouterr()
    assert "3/5" in captured.err and "loss=1.500" in captured.err
    assert captured.out.strip() == "step 4: validation loss 2, perplexity 7.389"


def test_mfu(eight_devices: FinishedRun) -> None:
    found = scalars(eight_devices.workdir)
    config = eight_devices.config
    per_token = train_flops_per_token(config.model, config.data.seq_len)
    speeds = {step: value for tag, step, value in found if tag == "train/tokens_per_second"}
    mfu = {step: value for tag, step, value in found if tag == "train/mfu"}
    assert mfu.keys() == speeds.keys() == {2, 4, 6, 8, 10, 12, 13}
    for step, speed in speeds.items():
        assert mfu[step] == pytest.approx(speed * per_token / (1e12 * jax.device_count()))
        assert speed > 0


def test_no_mfu_without_a_peak(config: schema.Config, tmp_path: Path) -> None:
    with Reporter(tmp_path, config, 0) as reporter:
        reporter.step(2, METRICS)
    assert "train/mfu" not in {tag for tag, _, _ in scalars(tmp_path)}


def test_tensorboard_and_metrics_agree(one_device: FinishedRun) -> None:
    losses = {r["step"]: r["loss"] for r in records(one_device.workdir) if "loss" in r}
    shown = {s: v for tag, s, v in scalars(one_device.workdir) if tag == "train/loss"}
    assert shown.keys() == {2, 4, 6, 8, 10, 12, 13}
    for step, loss in shown.items():
        assert loss == pytest.approx(losses[step])
