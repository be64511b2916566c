"""Output layers on WikiText-2, word level (V = 33,278): perplexity against size.

--data is a directory with the WikiText-2 files. A small trunk (D = 128, two layers, RoPE), of
which the full output layer has more than ten times the parameters: a harder case than real models.
"""

from pathlib import Path

from campaign import Campaign
from campaigns import heads


def campaign(data: Path) -> Campaign:
    return Campaign(
        config="benchmarks/campaigns/base.py",
        paths={"data.dataset.path": data},
        overrides={
            "data.batch_size": 8,
            "model.attention.kind": "rope",
            "model.embed_dim": 128,
            "model.num_layers": 2,
            "model.num_heads": 2,
            "model.num_kv_heads": 2,
            "model.mlp_dim": 352,
            "train.steps": 600,
            "train.checkpoint_every": 600,
            "optimizer.warmup_steps": 50,
        },
        baseline="full",
        maps=heads.maps(num_codes=332),
        variants=heads.variants(num_codes=332, dim=128),
    )
