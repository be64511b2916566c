"""Output layers on WikiText-2 with a wider trunk, D = 512: how many codes does a token need?

--data is a directory with the WikiText-2 files. Half of the steps of `heads_wikitext2.py`.
"""

import dataclasses
from pathlib import Path

from campaign import Campaign
from campaigns import heads, heads_wikitext2


def campaign(data: Path) -> Campaign:
    narrow = heads_wikitext2.campaign(data)
    return dataclasses.replace(
        narrow,
        overrides={
            **narrow.overrides,
            "model.embed_dim": 512,
            "model.num_heads": 8,
            "model.num_kv_heads": 8,
            "model.mlp_dim": 1408,
            "train.steps": 300,
            "train.checkpoint_every": 300,
        },
        variants=heads.variants(num_codes=332, dim=512),
        learning_rate=2e-3,
    )
