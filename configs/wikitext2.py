"""WikiText-2 at word level (V = 33,278) with product codes in classes: about 4 epochs.

Trunk 3.2M parameters, input embedding 8.5M, codebook 0.02M, a bias and a scale per token 0.07M (a
full output layer: 8.5M). The paper's form, one code a token, see docs/output_layer.md:
--config.model.head.kind=vq --config.model.head.num_codes=333
"""

from vqcx_jax.config import schema


def get_config() -> schema.Config:
    """Everything that is not named here has the schema's default."""
    return schema.Config(
        model=schema.Model(
            embed_dim=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=64,
            mlp_dim=704,
            attention=schema.PopeAttention(),
            head=schema.ClassVQHead(),
        ),
        data=schema.Data(
            dataset=schema.WikiText(kind="wikitext2"),
            tokenizer=schema.WordTokenizer(),
            seq_len=256,
            batch_size=16,
        ),
        optimizer=schema.Optimizer(learning_rate=2e-3, schedule="cosine", warmup_steps=100),
        train=schema.Training(steps=2000, eval_every=250, checkpoint_every=250),
    )
