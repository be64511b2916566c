"""The command line: flags, overrides, and what a shell sees of an error."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from vqcx_jax.cli import parse_args
from vqcx_jax.config.schema.types import NonNegative, Positive
from vqcx_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a language model."""

    config: Annotated[str, "configuration file"] = "configs/quickstart.py"
    workdir: Annotated[str, "where checkpoints and logs go"] = "runs"


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluates a checkpoint."""

    checkpoint: Annotated[str, "directory of a run"]
    step: Annotated[NonNegative | None, "which checkpoint; none: the last"] = None
    task: Annotated[Literal["perplexity", "generate"], "perplexity or generate"] = "perplexity"
    prompt: Annotated[str, "text to continue"] = ""
    max_tokens: Annotated[Positive, "tokens to generate, 100% of them"] = 64
    temperature: Annotated[float, "0: greedy"] = 1.0


def test_defaults() -> None:
    assert parse_args(Train, []) == (Train(), [])
    assert parse_args(Eval, ["--checkpoint", "a"]) == (Eval(checkpoint="a"), [])


def test_flags_with_and_without_an_equals_sign() -> None:
    flags, overrides = parse_args(Train, ["--config=a.py", "--workdir", "/tmp/x=y"])
    assert flags == Train(config="a.py", workdir="/tmp/x=y")
    assert overrides == []
    flags, _ = parse_args(Train, ["--workdir=/tmp/x=y", "--config", "a.py", "--config", "b.py"])
    assert flags == Train(config="b.py", workdir="/tmp/x=y")


def test_overrides_in_both_forms_and_any_place() -> None:
    argv = [
        *("--config.train.steps", "7", "--workdir=w", "--config.model.head.kind=full"),
        *("--config.mesh.data", "-1", "--config", "a.py", "--config.train.sample_prompt=a=b"),
        *("--config.sharding.codes=", "--config.sharding.embed", ""),
    ]
    flags, overrides = parse_args(Train, argv)
    assert flags == Train(config="a.py", workdir="w")
    assert overrides == [
        ("train.steps", "7"),
        ("model.head.kind", "full"),
        ("mesh.data", "-1"),
        ("train.sample_prompt", "a=b"),
        ("sharding.codes", ""),
        ("sharding.embed", ""),
    ]


def test_flags_are_typed() -> None:
    argv = ["--checkpoint=c", "--step", "3", "--task=generate", "--temperature", "0"]
    flags, _ = parse_args(Eval, argv)
    assert flags == Eval(checkpoint="c", step=3, task="generate", temperature=0.0)
    assert parse_args(Eval, ["--checkpoint=c", "--step=none"])[0].step is None


@pytest.mark.parametrize(
    ("flags", "argv", "parts"),
    [
        (Train, ["--workdr=x"], ["--workdr: no such flag (did you mean --workdir?)", "--config"]),
        (Train, ["--work=x"], ["--work: no such flag"]),  # No abbreviations.
        (Train, ["model.num_layers=3"], ["model.num_layers: no such flag"]),
        (Train, ["--workdir"], ["--workdir: expected one argument"]),
        (Train, ["--config.train.steps"], ["--config.train.steps: needs a value"]),
        (Train, ["--config.train.steps", "--workdir=w"], ["--config.train.steps: needs a value"]),
        (Eval, [], ["--checkpoint: is missing", "directory of a run"]),
        (Eval, ["--chekpoint=x"], ["--chekpoint: no such flag (did you mean --checkpoint?)"]),
        (Eval, ["--checkpoint=x", "--max-tokens=3"], ["did you mean --max_tokens?"]),
        (Eval, ["--checkpoint=x", "--config.train.steps=3"], ["--config.train.steps: no such"]),
        (
            Eval,
            ["--checkpoint=x", "--step=abc"],
            ["--step='abc': must be a valid integer, or none"],
        ),
        (
            Eval,
            ["--checkpoint=x", "--step=-1"],
            ["--step='-1': must be greater than or equal to 0"],
        ),
        (Eval, ["--checkpoint=x", "--max_tokens=0"], ["--max_tokens='0': must be greater than"]),
        (Eval, ["--checkpoint=x", "--task=score"], ["--task='score': must be 'perplexity' or "]),
    ],
)
def test_messages(flags: type, argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(flags, argv)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_help_says_how_to_override(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(Train, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Trains a language model." in text
    assert "configuration file (default: 'configs/quickstart.py')" in text
    assert "--config.model.head.kind=full" in text
    schema_file = text.strip().rpartition(" ")[2]
    assert Path(schema_file).parent.name == "schema" and Path(schema_file).is_file()


def test_help_without_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(Eval, ["--help"])
    text = capsys.readouterr().out
    assert "--checkpoint=VALUE" in text and "directory of a run (required)" in text
    assert "100% of them" in text
    assert "overridden" not in text


def test_some_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config.model.x=3", "--checkpoint=a", "--config.model.y", "4"]
    flags, overrides = parse_args(Eval, argv, ["model.x", "model.y"])
    assert flags == Eval(checkpoint="a")
    assert overrides == [("model.x", "3"), ("model.y", "4")]
    with pytest.raises(SystemExit):
        parse_args(Eval, ["--help"], ["model.x", "model.y"])
    text = capsys.readouterr().out
    assert text.endswith("overridden:\n  --config.model.x=VALUE\n  --config.model.y=VALUE\n")


SCRIPT = """
import sys
from dataclasses import dataclass
from typing import Annotated
from vqcx_jax import cli
from vqcx_jax.config import apply_overrides, load_config, validate
from vqcx_jax.errors import NonFiniteLossError, UserError

@dataclass
class Flags:
    "Trains."
    config: Annotated[str, "file"] = "none.py"
    fail: Annotated[str, "what to raise"] = ""

def main():
    flags, overrides = cli.parse_args(Flags, sys.argv[1:])
    errors = [NonFiniteLossError, KeyboardInterrupt, ZeroDivisionError]
    for error in errors:
        if error.__name__ == flags.fail:
            raise error("step 3")
    config = apply_overrides(load_config(flags.config), overrides)
    print(validate(config).train.steps)

cli.run(main)
"""
CONFIG = "from vqcx_jax.config import Config\ndef get_config(): return Config()\n"
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--config=mine.py", "--config.train.steps=77"], 0, "77\n", ""),
        (["--config=mine.py", "--config.train.stesp=77"], 2, "", "error: train.stesp: no such"),
        (["--config=mine.py", "--config.train.steps=5"], 2, "", "error: optimizer.warmup_steps=50"),
        (["--config=mien.py"], 2, "", "error: mien.py: no such configuration file (did you mean"),
        (["--confg=mine.py"], 2, "", "error: --confg: no such flag"),
        (["--fail=NonFiniteLossError"], 1, "", "error: step 3\n"),
        (["--fail=KeyboardInterrupt"], 130, "", ""),
    ],
)
def test_what_a_shell_sees(tmp_path: Path, argv: list[str], code: int, out: str, err: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mine.py").write_text(CONFIG)
    done = run_script(tmp_path, argv)
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") == (1 if err else 0)


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_script(tmp_path, ["--fail=ZeroDivisionError"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError: step 3" in done.stderr


def run_script(directory: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "script.py", *argv]
    return subprocess.run(
        command,
        cwd=directory,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
