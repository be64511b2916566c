"""Output layers on code and prose with a BPE of 16,384 tokens: perplexity against size.

--data is the file that benchmarks/campaigns/mixed_corpus.py writes. D = 256, two layers, RoPE.
"""

from pathlib import Path

from campaign import Campaign
from campaigns import heads


def campaign(data: Path) -> Campaign:
    return Campaign(
        config="benchmarks/campaigns/base.py",
        paths={"data.dataset.path": data},
        overrides={
            "data.dataset.kind": "text_files",
            "data.tokenizer.kind": "bpe",
            "data.tokenizer.vocab_size": 16_384,
            "data.batch_size": 8,
            "model.attention.kind": "rope",
            "model.num_layers": 2,
            "train.steps": 600,
            "train.checkpoint_every": 600,
            "train.final_eval_batches": 150,
            "optimizer.warmup_steps": 50,
        },
        baseline="full",
        maps=heads.maps(num_codes=164),
        variants=heads.variants(num_codes=164, dim=256),
        learning_rate=2e-3,
    )
