"""Output layers on WikiText-2, word level, trained four times as long: 2.4 epochs.

Product codes in classes and what they stand against, in the trunk of heads_wikitext2.py. There half
an epoch decides, and with it where the vectors start; here it should matter less.
"""

import dataclasses
from pathlib import Path

from campaign import Campaign
from campaigns import heads_wikitext2

VARIANTS = (
    "full",
    "product 16 in classes",
    "full, from co-occurrence and counts",
    "product 64 x 64 in classes, not rotated",
)


def campaign(data: Path) -> Campaign:
    short = heads_wikitext2.campaign(data)
    steps = 4 * short.overrides["train.steps"]
    overrides = {**short.overrides, "train.steps": steps, "train.checkpoint_every": steps}
    return dataclasses.replace(
        short,
        overrides=overrides,
        variants={name: short.variants[name] for name in VARIANTS},
        learning_rate=2e-3,
    )
