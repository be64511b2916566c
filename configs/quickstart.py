"""A first run in minutes on a CPU: Python's own source files, BPE of 2,048 tokens, VQ-Logits.

Trunk 1.8M parameters, input embedding 0.4M, codebook 0.01M (a full output layer: 0.4M).
"""

from vqcx_jax.config import schema


def get_config() -> schema.Config:
    """Everything that is not named here has the schema's default."""
    return schema.Config(
        model=schema.Model(
            embed_dim=192,
            num_layers=4,
            num_heads=6,
            num_kv_heads=6,
            head_dim=32,
            mlp_dim=512,
            attention=schema.PopeAttention(),
            head=schema.ClassVQHead(num_codebooks=16),
        ),
        data=schema.Data(
            dataset=schema.PythonStdlib(),
            tokenizer=schema.BPETokenizer(vocab_size=2048),
            seq_len=256,
            batch_size=8,
        ),
        optimizer=schema.Optimizer(learning_rate=2e-3, warmup_steps=50),
        train=schema.Training(
            steps=300,
            eval_every=150,
            final_eval_batches=50,
            checkpoint_every=150,
            sample_tokens=100,
            sample_prompt="def ",
        ),
    )
