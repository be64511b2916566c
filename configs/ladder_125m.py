"""Ladder, 125M: C4, 20 tokens per parameter (2.5 billion), a GPT-2-small shape.

Trunk 85.0M parameters, input embedding 25.2M, codebook 0.05M, a bias and a scale per
token 0.07M (a full output layer: 25.2M).
"""

from vqcx_jax.config import schema


def get_config() -> schema.Config:
    """Everything that is not named here has the schema's default."""
    return schema.Config(
        model=schema.Model(
            embed_dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            mlp_dim=2048,
            attention=schema.PopeAttention(),
            head=schema.ClassVQHead(),
            dtype="bfloat16",
        ),
        data=schema.Data(
            dataset=schema.TFDS(name="c4/en"),
            tokenizer=schema.BPETokenizer(vocab_size=32_768, train_documents=100_000),
            seq_len=1024,
            batch_size=256,
        ),
        optimizer=schema.Optimizer(learning_rate=1e-3, schedule="wsd", warmup_steps=500),
        train=schema.Training(
            steps=9500,
            eval_every=500,
            checkpoint_every=500,
            final_eval_batches=200,
        ),
    )
