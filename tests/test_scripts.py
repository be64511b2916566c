"""train.py and eval.py as a user runs them: stopped, killed, going on, and given bad input."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import records, tiny_config
from versions import oldest_jax

from vqcx_jax.config import schema, to_json

ROOT = Path(__file__).parents[1]
STEPS = 60
CONFIG_FILE = """
from vqcx_jax.config import from_json

def get_config():
    return from_json({fields!r})
"""
IN_TURN = """
import contextlib, io, json, runpy, sys
root, argvs = sys.argv[1:]
sys.path[0] = root
ends = []
for script, *arguments in json.loads(argvs):
    sys.argv = [script, *arguments]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(root + "/" + script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    ends.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(ends))
"""


@dataclasses.dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str


class Shell:
    """Runs the scripts in a directory of their own, with nothing of the user's environment."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.home = directory / "home"
        self.home.mkdir()

    def write_config(self, config: schema.Config) -> None:
        text = CONFIG_FILE.format(fields=to_json(config))
        (self.directory / "config.py").write_text(text)

    def start(self, script: str, *arguments: str, platform: str = "cpu") -> subprocess.Popen[str]:
        return self.python(str(ROOT / script), *arguments, platform=platform)

    def python(self, *argv: str, platform: str) -> subprocess.Popen[str]:
        env = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "JAX_PLATFORMS": platform,
            # Compiles in half the time.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            # Most of these processes compile the same step.
            "JAX_COMPILATION_CACHE_DIR": f"{self.directory}-compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        }
        return subprocess.Popen(
            [sys.executable, *argv],
            cwd=self.directory,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str, platform: str = "cpu") -> Finished:
        return finish(self.start(*argv, platform=platform))

    def run_in_turn(self, argvs: list[list[str]], platform: str) -> list[Finished]:
        """In one process, as two of the seconds that each takes alone are those of its start."""
        end = finish(
            self.python("-c", IN_TURN, str(ROOT), json.dumps(argvs), platform=platform),
        )
        assert (end.code, end.stderr) == (0, "")
        return [Finished(*fields) for fields in json.loads(end.stdout)]

    def train(self, workdir: str, *overrides: str) -> subprocess.Popen[str]:
        return self.start("train.py", "--config=config.py", f"--workdir={workdir}", *overrides)


def finish(process: subprocess.Popen[str]) -> Finished:
    stdout, stderr = process.communicate(timeout=120)
    return Finished(process.returncode, stdout, stderr)


def wait_for_lines(process: subprocess.Popen[str], workdir: Path, lines: int) -> None:
    """Returns once metrics.jsonl has that many lines."""
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, finish(process)
        time.sleep(0.005)


@dataclasses.dataclass(frozen=True)
class Runs:
    """One training run, uninterrupted, and twice in two processes."""

    shell: Shell
    whole: Finished
    stopped: Finished
    stopped_at: list[dict[str, Any]]
    continued: Finished
    killed: Finished
    killed_at: list[dict[str, Any]]
    recovered: Finished


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("runs")
    shell = Shell(directory)
    shell.write_config(
        tiny_config(
            directory,
            train__steps=str(STEPS),
            train__grad_accumulation="2",
            # So that every stop is between a step and its evaluation.
            train__eval_every="1",
            train__eval_batches="none",
            train__checkpoint_every="12",
            train__sample_tokens="8",
        )
    )
    whole, stopped = shell.train("whole"), shell.train("stopped")
    wait_for_lines(stopped, directory / "stopped", 20)
    stopped.send_signal(signal.SIGTERM)
    whole_end, stopped_end = finish(whole), finish(stopped)
    stopped_at = records(directory / "stopped")
    continued, killed = shell.train("stopped"), shell.train("killed")
    wait_for_lines(killed, directory / "killed", 60)
    killed.kill()
    continued_end, killed_end = finish(continued), finish(killed)
    killed_at = records(directory / "killed")
    recovered_end = finish(shell.train("killed"))
    return Runs(
        shell,
        whole_end,
        stopped_end,
        stopped_at,
        continued_end,
        killed_end,
        killed_at,
        recovered_end,
    )


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "time"} for record in metrics]


def test_uninterrupted_run(runs: Runs) -> None:
    assert runs.whole.code == 0
    metrics = records(runs.shell.directory / "whole")
    assert [r["step"] for r in metrics if "loss" in r] == list(range(1, STEPS + 1))
    evaluated = [r["step"] for r in metrics if "validation_loss" in r]
    assert evaluated == list(range(1, STEPS + 1))
    assert metrics[-2]["loss"] < metrics[0]["loss"] - 1
    validation = metrics[-1]["validation_perplexity"]
    assert f"validation perplexity {validation:.2f} per token" in runs.whole.stdout
    assert f"step {STEPS}, checkpoint " in runs.whole.stdout
    assert "sample:" in runs.whole.stdout


def test_sigterm_saves_and_says_how_to_go_on(runs: Runs) -> None:
    step = runs.stopped_at[-1]["step"]
    assert 10 <= step < STEPS
    assert runs.stopped.code == 128 + signal.SIGTERM
    checkpoint = runs.shell.directory / "stopped/checkpoints" / str(step)
    assert f"step {step}, checkpoint {checkpoint}" in runs.stopped.stdout
    assert "stopped by a signal; the same command goes on from here" in runs.stopped.stdout


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_interrupted_run_equals_uninterrupted_run(runs: Runs, name: str) -> None:
    before = {"stopped": runs.stopped_at, "killed": runs.killed_at}[name]
    assert before[-1]["step"] < STEPS
    end = {"stopped": runs.continued, "killed": runs.recovered}[name]
    assert end.code == 0
    metrics = records(runs.shell.directory / name)
    # Python's JSON keeps every bit of a float.
    assert without_time(metrics) == without_time(records(runs.shell.directory / "whole"))
    # It did go on and not start afresh: what was written before is still there.
    kept = [record for record in metrics if record in before]
    assert len(kept) >= 20
    assert (
        end.stdout.partition("sample:")[2].partition("next:")[0]
        == (runs.whole.stdout.partition("sample:")[2].partition("next:")[0])
    )


def test_kill_is_a_kill(runs: Runs) -> None:
    assert runs.killed.code == -signal.SIGKILL


def test_terminal_has_nothing_but_the_progress_bar(runs: Runs) -> None:
    for end in (runs.whole, runs.stopped, runs.continued, runs.recovered):
        lines = [line for line in re.split(r"[\r\n]", end.stderr) if line.strip()]
        assert [line for line in lines if not re.match(r" *\d+%\|", line)] == []


def test_nothing_is_written_elsewhere(runs: Runs) -> None:
    assert list(runs.shell.home.iterdir()) == []
    written = {"config.py", "documents.jsonl", "cache", "home", "whole", "stopped", "killed"}
    assert {path.name for path in runs.shell.directory.iterdir()} == written


def test_perplexity_of_a_run(runs: Runs) -> None:
    end = runs.shell.run("eval.py", "--checkpoint=whole")
    assert (end.code, end.stderr) == (0, "")
    number = r"([\d,]+(?:\.\d+)?)"
    match = re.fullmatch(
        rf"step {STEPS}, validation: {number} documents\n"
        rf"perplexity per token +{number} +\({number} tokens\)\n"
        rf"perplexity per word +{number} +\({number} words\)\n"
        rf"bits per byte +{number} +\({number} bytes\)\n",
        end.stdout,
    )
    assert match, end.stdout
    documents, per_token, tokens, per_word, words, bits, num_bytes = (
        float(group.replace(",", "")) for group in match.groups()
    )
    assert tokens == num_bytes + documents  # A bytes tokenizer, and the end of each.
    validation = records(runs.shell.directory / "whole")[-1]
    assert per_token == pytest.approx(validation["validation_perplexity"], rel=1e-4)
    nll = validation["validation_loss"] * tokens
    assert per_word == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert bits == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-3)


@oldest_jax
def test_perplexity_of_another_text(runs: Runs) -> None:
    text = runs.shell.directory / "home/other.txt"
    text.write_text("the lazy dog")
    end = runs.shell.run("eval.py", "--checkpoint=whole", "--text=home/other.txt")
    text.unlink()
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout.startswith(f"step {STEPS}, home/other.txt: 1 documents\nperplexity per token")
    assert "(13 tokens)" in end.stdout and "(12 bytes)" in end.stdout


@oldest_jax
def test_perplexity_by_position_in_longer_rows(runs: Runs) -> None:
    end = runs.shell.run(
        "eval.py",
        "--checkpoint=whole",
        "--split=train",
        "--seq_len=64",
        "--by_position=true",
        "--config.model.attention.extension=ntk",
        "--config.model.attention.extension_factor",
        "2",
    )
    assert (end.code, end.stderr) == (0, "")
    text, _, table = end.stdout.partition("\n\n")
    heading, *lines = table.splitlines()
    assert heading.split() == ["positions", "perplexity", "per", "token"]
    parts = [re.fullmatch(r"(\d+) to (\d+) +[\d.]+  \(([\d,]+) tokens\)", line) for line in lines]
    buckets = [(int(part[1]), int(part[2])) for part in parts if part]
    assert buckets[:-1] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    assert buckets[-1][0] == 32 < buckets[-1][1] < 64
    tokens = re.search(r"\(([\d,]+) tokens\)", text)
    assert tokens and int(tokens[1].replace(",", "")) == sum(
        int(part[3].replace(",", "")) for part in parts if part
    )


def test_text_of_a_moved_run(runs: Runs) -> None:
    shutil.copytree(runs.shell.directory / "whole", runs.shell.directory / "home/moved")
    end = runs.shell.run(
        "eval.py",
        "--checkpoint=home/moved",
        "--task=generate",
        "--prompt=the quick",
        "--max_tokens=12",
        "--temperature=0",
    )
    shutil.rmtree(runs.shell.directory / "home/moved")
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout.startswith("the quick")
    assert len(end.stdout.rstrip("\n")) <= len("the quick") + 12


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    directory = tmp_path_factory.mktemp("shell")
    shell = Shell(directory)
    shell.write_config(tiny_config(directory))
    return shell


def check_one_line(end: Finished, code: int, message: str) -> None:
    assert end.code == code, end
    assert end.stdout == ""
    line = end.stderr.removesuffix("\n")
    assert line.startswith("error: ") and "\n" not in line
    assert message in line


# (arguments, message)
BAD_CONFIG = [
    (["--config.train.stesp=3"], "train.stesp: no such field (did you mean train.steps?)"),
    (["--config.train.steps=ten"], "train.steps='ten': must be a valid integer"),
    (["--config=none.py"], "none.py: no such configuration file"),
    (["--config.optimizer.warmup_steps=6"], "must be less than train.steps=6"),
    (["--workdir=gs://bucket/run"], "--workdir='gs://bucket/run': must be a path, not a URL"),
    (["--workdir="], "--workdir='': must be a path"),
    (["--workdir=config.py/run"], "workdir='config.py/run': must be a directory, "),
    (["--wrokdir=x"], "--wrokdir: no such flag (did you mean --workdir?)"),
    (["--process_id=0"], "process_id=0: only with distributed=true"),
    (["--distributed=true", "--num_processes=2"], "coordinator, process_id: must be given, too"),
]
BAD_FIT = [
    (["--config.data.cache_dir=config.py"], "config.py': must be a directory, "),
    (["--config.data.cache_dir=gs://bucket"], "cache_dir='gs://bucket': must be a path"),
    (["--config.mesh.data=4"], "mesh.data=4 * mesh.fsdp=1 * mesh.tensor=1"),
    (["--config.data.dataset.path=nowhere"], "data.dataset.path='nowhere': no such text"),
    (
        ["--config.data.tokenizer.kind=bpe"],
        "data.tokenizer.vocab_size=4096: the training text gives only",
    ),
    (
        ["--config.model.vocab_size=20"],
        "model.head.num_codes=32: must be at most model.vocab_size=20",
    ),
]
BAD_EVALUATION = [
    ([], "--checkpoint: is missing, must be given"),
    (["--checkpoint=gs://bucket/run"], "--checkpoint='gs://bucket/run': must be a path"),
    (["--checkpoint=nowhere"], "nowhere': no checkpoint found there"),
    (["--checkpoint=nowhere", "--split=dev"], "--split='dev': must be 'train', 'validation'"),
    (
        ["--checkpoint=nowhere", "--config.model.embed_dim=3"],
        "model.embed_dim='3': cannot change after training; accepted are model.attention.",
    ),
    (
        ["--checkpoint=nowhere", "--task=generate", "--split=test"],
        "--split='test': must not be given with --task=generate",
    ),
    (
        ["--checkpoint=nowhere", "--prompt=the", "--temperature=0"],
        "--prompt='the': must not be given with --task=perplexity",
    ),
    (
        ["--checkpoint=nowhere", "--split=test", "--text=a.txt"],
        "--split='test': must not be given with --text='a.txt'",
    ),
]
TRAIN = ["train.py", "--config=config.py", "--workdir=run"]


def check_each(
    shell: Shell, start: list[str], cases: list[tuple[list[str], str]], platform: str
) -> None:
    ends = shell.run_in_turn([start + arguments for arguments, _ in cases], platform)
    for end, (_, message) in zip(ends, cases, strict=True):
        check_one_line(end, 2, message)


def test_bad_config(shell: Shell) -> None:
    """No device is asked for: there is none of this platform."""
    check_each(shell, TRAIN, BAD_CONFIG, "nonesuch")
    assert not (shell.directory / "run").exists()


@oldest_jax
def test_config_that_does_not_fit_the_machine_or_the_text(shell: Shell) -> None:
    check_each(shell, TRAIN, BAD_FIT, "cpu")
    assert not (shell.directory / "run").exists()


def test_bad_evaluation(shell: Shell) -> None:
    check_each(shell, ["eval.py"], BAD_EVALUATION, "nonesuch")
    assert not (shell.directory / "nowhere").exists()


def test_every_flag_of_evaluation_is_of_a_task() -> None:
    """Or of both: one that the table lacks would be ignored by the other task."""
    spec = importlib.util.spec_from_file_location("evaluation_script", ROOT / "eval.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # Where dataclasses look for the module of a class.
    spec.loader.exec_module(script)
    of_tasks = [name for names in script.FLAGS_OF_TASK.values() for name in names]
    names = [field.name for field in dataclasses.fields(script.Flags)]
    assert sorted([*of_tasks, "checkpoint", "step", "task"]) == sorted(names)


@oldest_jax
def test_missing_step_and_split(runs: Runs) -> None:
    end = runs.shell.run("eval.py", "--checkpoint=whole", "--step=3", platform="nonesuch")
    check_one_line(end, 2, "step=3: ")
    end = runs.shell.run("eval.py", "--checkpoint=whole", "--split=test")
    check_one_line(end, 2, "split='test'")


@oldest_jax
def test_other_architecture(runs: Runs) -> None:
    end = finish(runs.shell.train("whole", "--config.model.mlp_dim=64"))
    check_one_line(end, 2, "params/blocks/mlp/up: float32(2, 16, 32) in the checkpoint")
    assert len(records(runs.shell.directory / "whole")) == 2 * STEPS


@oldest_jax
def test_divergence(shell: Shell) -> None:
    """A loss that is finite, of a step that makes weights which are not."""
    end = finish(
        shell.train(
            "diverging",
            "--config.optimizer.learning_rate=1e25",
            "--config.optimizer.warmup_steps=0",
            "--config.train.checkpoint_every=1",
        )
    )
    assert end.code == 1
    line = end.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in end.stderr
    assert "param_norm is inf at step 1; last good checkpoint: there is none" in line
    assert records(shell.directory / "diverging") == []
    assert list((shell.directory / "diverging/checkpoints").iterdir()) == []
