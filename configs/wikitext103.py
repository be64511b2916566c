"""WikiText-103 with a BPE of 32,768 tokens (word level would need 267,735): 655M tokens.

Trunk 25.7M parameters, input embedding 16.8M, codebook 0.1M, a bias and a scale per
token 0.07M (a full output layer: 16.8M).
"""

from vqcx_jax.config import schema


def get_config() -> schema.Config:
    """Everything that is not named here has the schema's default."""
    return schema.Config(
        model=schema.Model(
            embed_dim=512,
            num_layers=8,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=1408,
            attention=schema.PopeAttention(),
            head=schema.ClassVQHead(num_codebooks=16, num_codes=256),
            dtype="bfloat16",
        ),
        data=schema.Data(
            dataset=schema.WikiText(kind="wikitext103"),
            tokenizer=schema.BPETokenizer(vocab_size=32_768),
            seq_len=512,
            batch_size=64,
        ),
        optimizer=schema.Optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=500),
        train=schema.Training(steps=20_000, eval_every=1000, checkpoint_every=1000),
    )
