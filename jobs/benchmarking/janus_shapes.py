"""Make Janus models of published shapes, for timing.

Their weights are random: speed does not depend on what a model has learnt.
"""

from __future__ import annotations

import torch
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

# hidden size, layers, heads, width of the MLP, words, visual tokens per picture, codebook rows
SHAPES = {
    "janus-pro-1b": (2048, 24, 16, 5632, 102400, 576, 16384),
    "janus-pro-7b": (4096, 30, 32, 11008, 102400, 576, 16384),
    "janus-tiny": (64, 2, 2, 128, 200, 16, 512),  # to try things out
}


def random_janus(name: str) -> JanusForConditionalGeneration:
    """Return one of `SHAPES`, in bfloat16 on a GPU where there is one, else in float32 on the CPU.

    Its ``generation_config`` is complete, as `token_sampler` needs it.
    """
    hidden, layers, heads, mlp, words, tokens, codes = SHAPES[name]
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=words,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=16384,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        # Neither the vision tower nor the VQ model takes part in sampling, so small ones will do.
        vision_config=JanusVisionConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16 * round(tokens**0.5),
            patch_size=16,
            projection_dim=hidden,
            num_image_tokens=tokens,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            base_channels=32,
            latent_channels=32,
            num_res_blocks=0,
            projection_dim=hidden,
            image_token_embed_dim=hidden,
        ),
        image_token_id=6,
    )
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = (
            JanusForConditionalGeneration(config)
            .to(torch.bfloat16 if cuda else torch.float32)
            .eval()
        )
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = 0, 1, 2
    generation.generation_kwargs = {"boi_token_id": 4}
    return model.requires_grad_(False)
