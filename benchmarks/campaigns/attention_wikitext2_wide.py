"""Kinds of attention on WikiText-2, words, for a GPU; --data is a directory with its files.

D = 256, four layers, four heads of 64, 1,000 steps of 4,096 tokens: two epochs. Product codes in
classes for an output layer.
"""

import dataclasses
from pathlib import Path

from campaign import Campaign
from campaigns import heads
from campaigns.attention import VARIANTS


def campaign(data: Path) -> Campaign:
    head = heads.variants(num_codes=332, dim=256)["product 16 in classes"]
    return Campaign(
        config="benchmarks/campaigns/base.py",
        paths={"data.dataset.path": data},
        overrides={
            "train.checkpoint_every": 100_000,
            "optimizer.warmup_steps": 100,
            **head.overrides,
            "train.steps": 1000,
        },
        baseline="RoPE",
        maps=heads.maps(num_codes=332),
        variants={
            name: dataclasses.replace(variant, token_map=head.token_map)
            for name, variant in VARIANTS.items()
        },
        seeds=5,
        report="attention",
        lengths=(256, 512, 1024),
    )
