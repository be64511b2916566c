"""Trains a language model: python train.py --config=configs/NAME.py --workdir=DIR."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import jax

from vqcx_jax import cli
from vqcx_jax.config import apply_overrides, load_config
from vqcx_jax.config.schema import Config
from vqcx_jax.config.schema.types import NonNegative, Positive
from vqcx_jax.errors import UserError
from vqcx_jax.paths import local_path
from vqcx_jax.training import TrainResult, processes, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Trains a language model, or goes on with the newest checkpoint in --workdir."""

    config: Annotated[str, "configuration file"] = str(
        Path(__file__).parent / "configs/quickstart.py"
    )
    workdir: Annotated[str, "directory of the run: checkpoints, metrics"] = "runs/quickstart"
    distributed: Annotated[
        bool, "one of several processes with the same command, as on TPU pods and under SLURM"
    ] = False
    coordinator: Annotated[str | None, "distributed: HOST:PORT of process 0; none: found"] = None
    num_processes: Annotated[Positive | None, "distributed: with coordinator"] = None
    process_id: Annotated[NonNegative | None, "distributed: with coordinator"] = None


def main() -> None:
    flags, overrides = cli.parse_args(Flags, sys.argv[1:])
    workdir = local_path("--workdir", flags.workdir)
    group = {name: getattr(flags, name) for name in ("coordinator", "num_processes", "process_id")}
    if flags.distributed:
        processes.connect(**group)
    elif given := [name for name, value in group.items() if value is not None]:
        raise UserError(f"{given[0]}={group[given[0]]}: only with distributed=true")
    config = apply_overrides(load_config(flags.config), overrides)
    result = train(config, workdir)
    if jax.process_index() == 0:  # It prints for all.
        report(result, config, workdir)
    if result.stopped_by:
        sys.exit(128 + result.stopped_by)


def report(result: TrainResult, config: Config, workdir: Path) -> None:
    print(f"\nstep {result.step}, checkpoint {result.checkpoint}")
    if result.stopped_by:
        print("stopped by a signal; the same command goes on from here")
        return
    loss = result.validation
    assert loss is not None
    print(f"validation perplexity {loss.perplexity:.2f} per token ({loss.tokens:,} tokens)")
    prompt = config.train.sample_prompt
    if result.sample:
        print(f"sample:\n{prompt}{result.sample}\n")
    command = ["python", "eval.py", f"--checkpoint={workdir}", "--task=generate", "--seed=1"]
    print("next:", shlex.join([*command, f"--prompt={prompt}"] if prompt else command))


if __name__ == "__main__":
    cli.run(main)
