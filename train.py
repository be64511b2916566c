"""Trains a language model: python train.py --config=configs/NAME.py --workdir=DIR."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from vqcx_jax import cli
from vqcx_jax.config import apply_overrides, load_config
from vqcx_jax.training import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Trains a language model, or goes on with the newest checkpoint in --workdir."""

    config: Annotated[str, "configuration file"] = str(
        Path(__file__).parent / "configs/quickstart.py"
    )
    workdir: Annotated[str, "directory of the run: checkpoints, metrics"] = "runs/quickstart"


def main() -> None:
    flags, overrides = cli.parse_args(Flags, sys.argv[1:])
    config = apply_overrides(load_config(flags.config), overrides)
    result = train(config, Path(flags.workdir))
    print(f"\nstep {result.step}, checkpoint {result.checkpoint}")
    if result.validation is None:
        print("stopped by a signal; the same command goes on from here")
        return
    print(f"validation perplexity {result.validation.perplexity:.2f} per token")
    if result.sample:
        print(f"sample:\n{result.sample}\n")
    print(f"next: python eval.py --checkpoint={flags.workdir} --task=generate --prompt='import '")


if __name__ == "__main__":
    cli.run(main)
