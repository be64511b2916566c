"""Heads and attentions side by side: python benchmarks/wikitext2.py --data=DIR [--steps=300].

Trains configs/wikitext2.py once for each combination, one process after the other on the same
machine, and prints a Markdown table: training and validation loss, tokens/s (median step after
the first 20) and peak memory of the process. One seed and one learning rate: a look at whether
everything trains, not a comparison of quality.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_CODEBOOK = [
    "--config.model.head.kind=vq",
    "--config.model.head.form=additive",
    "--config.model.head.num_codebooks=1",
    "--config.model.head.num_codes=333",
    "--config.model.head.assignment=frequency",
    "--config.model.head.code_init=random",
    "--config.model.head.token_scale=false",
]
FULL = ["--config.model.head.kind=full", "--config.model.head.token_bias=true"]
VARIANTS = {
    "vq, complex": [*ONE_CODEBOOK, "--config.model.attention.kind=complex"],
    "vq, rope": [*ONE_CODEBOOK, "--config.model.attention.kind=rope"],
    "full, complex": [*FULL, "--config.model.attention.kind=complex"],
    "full, rope": [*FULL, "--config.model.attention.kind=rope"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="directory with the WikiText-2 files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--config", default=str(ROOT / "configs" / "wikitext2.py"))
    args, overrides = parser.parse_known_args()
    print("| head, attention | train loss, last 20 steps | validation loss | tokens/s | peak GiB |")
    print("|---|---|---|---|---|")
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as workdir:
            command = [
                sys.executable,
                str(ROOT / "train.py"),
                f"--config={args.config}",
                f"--workdir={workdir}",
                f"--config.data.dataset.path={args.data}",
                f"--config.train.steps={args.steps}",
                "--config.train.eval_every=0",
                "--config.train.sample_tokens=0",
                *variant,
                *overrides,
            ]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"{name}: train.py failed")
            print(
                f"| {name} | {_summary(Path(workdir) / 'metrics.jsonl')} "
                f"| {usage.ru_maxrss / 2**20:.2f} |",
                flush=True,
            )


def _summary(path: Path) -> str:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    seconds = [b["time"] - a["time"] for a, b in itertools.pairwise(steps[20:])]
    train_loss = statistics.mean(r["loss"] for r in steps[-20:])
    validation_loss = records[-1]["validation_loss"]
    speed = steps[-1]["tokens"] / statistics.median(seconds)
    return f"{train_loss:.3f} | {validation_loss:.3f} | {speed:,.0f}"


if __name__ == "__main__":
    main()
