"""How long a training step of a campaign's variants takes, when nothing else runs.

    python benchmarks/campaign_times.py CAMPAIGN.py --data=DIR --work=DIR --only NAME ...

Each repetition trains every variant in turn for some steps, in a process of its own, as
benchmarks/campaign.py does; of a run the median of its steps is taken, without the first 20.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

from campaign import FailedError, Run, load, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("campaign", type=Path)
    parser.add_argument("--data", type=Path, default=Path(), help="where the campaign's text is")
    parser.add_argument("--work", type=Path, required=True, help="as of benchmarks/campaign.py")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    campaign = load(args.campaign, args.data)
    names = args.only or list(campaign.variants)
    unknown = [name for name in names if name not in campaign.variants]
    if unknown:
        parser.error(f"--only {unknown}: must be among {list(campaign.variants)}")
    short = {"train.steps": args.steps, "train.checkpoint_every": args.steps}
    short |= {"train.final_eval_batches": 1, "optimizer.warmup_steps": 0}
    campaign = dataclasses.replace(campaign, overrides={**campaign.overrides, **short})
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            run = Run(name, campaign.learning_rate, seed=0)
            try:
                record = train(campaign, run, args.work, args.work / "timed")
            except FailedError as error:
                sys.exit(f"{name}: {error}")
            seconds[name].append(record["seconds_per_step"])
    of_base = statistics.fmean(seconds[names[0]])
    print(f"| head | s a step | min - max | time / {names[0]}'s |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        mean = statistics.fmean(times)
        print(
            f"| {name} | {mean:.3f} | {min(times):.3f} - {max(times):.3f} | {mean / of_base:.2f} |"
        )


if __name__ == "__main__":
    main()
