"""What a run writes besides its checkpoints."""

from pathlib import Path

import pytest
from tiny_run import records, scalars, tiny_config

from vqcx_jax.config import schema
from vqcx_jax.training.reporting import Reporter

METRICS = {"loss": 1.5, "tokens": 100.0}


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


def test_no_mfu_without_a_peak(config: schema.Config, tmp_path: Path) -> None:
    with Reporter(tmp_path, config, 0) as reporter:
        reporter.step(2, METRICS)
    assert "train/mfu" not in {tag for tag, _, _ in scalars(tmp_path)}
