import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import save_checkpoint, tiny_config

from vqcx_jax.errors import UserError
from vqcx_jax.evaluation import TrainedModel
from vqcx_jax.evaluation.plot_attention import float32_model, main


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("plot")
    options = {"model__attention__kind": "complex", "model__dtype": "bfloat16"}
    save_checkpoint(tiny_config(workdir, **options), workdir / "run")
    return workdir


def plot(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_attention", *arguments])
    main()


def test_model_is_float32(workdir: Path) -> None:
    model = float32_model(TrainedModel.load(workdir / "run"))
    assert model.hidden(jnp.zeros((1, 3), jnp.int32)).dtype == jnp.float32


def test_files(
    workdir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figure, numbers = tmp_path / "new/attention.svg", tmp_path / "new/attention.npz"
    arguments = [f"--checkpoint={workdir / 'run'}", f"--output={figure}", "--rows=1"]
    window = "--config.model.attention.window=8"
    plot(monkeypatch, *arguments, "--seq_len=16", window)
    assert capsys.readouterr().out == f"wrote {figure} and {numbers}\n"
    assert figure.read_text().startswith("<?xml")
    arrays = np.load(numbers)
    assert arrays["delta"].shape == (2, 2, 2) and arrays["bias"].shape == (2, 4, 2)
    np.testing.assert_allclose(arrays["sums"].sum(axis=-1), arrays["pairs"][0], rtol=1e-5)
    assert arrays["sums"].shape == (2, 4, 16) and arrays["pairs"][0] == 16
    assert arrays["pairs"][7] > 0 == arrays["pairs"][8:].sum() == arrays["sums"][..., 8:].sum()
    with pytest.raises(UserError, match="attention.svg exists; --overwrite=true replaces it"):
        plot(monkeypatch, *arguments)
    plot(monkeypatch, *arguments, "--overwrite=true")
    pairs = np.load(numbers)["pairs"]
    assert len(pairs) == 32 and 16 < pairs[0] < 32  # One short document, and padding.


def test_output_that_is_no_svg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--output='x.png': must end in .svg"):
        plot(monkeypatch, f"--checkpoint={tmp_path}", "--output=x.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs matplotlib"):
        plot(monkeypatch, f"--checkpoint={tmp_path}", f"--output={tmp_path / 'x.svg'}")
