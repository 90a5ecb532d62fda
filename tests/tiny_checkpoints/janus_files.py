"""Make a small Janus: model, processor, and the adapter over both."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from isic_ray.models.families.janus import JanusModel

JANUS_SIDE = 32  # of its pictures, in pixels
JANUS_TOKENS, JANUS_CODES = 16, 64
_HIDDEN = 64
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<boi>", "<eoi>", "<image>"]
_TEXT = "a red blue cat dog knife on the table with and of yes no ? :"
JANUS_WORDS = _TEXT.split()
_TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %} "
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def tiny_janus(kind: type[JanusModel] = JanusModel, template: str | None = _TEMPLATE) -> JanusModel:
    """Return an adapter of class ``kind`` with the weights of `janus_model`."""
    model = janus_model()
    table = model.model.vqmodel.quantize.embedding.weight
    return kind(model, janus_processor(template), "digest", table.detach().clone())


def janus_word(word: str) -> int:
    """Return the token id of one of `JANUS_WORDS`."""
    return len(SPECIAL) + JANUS_WORDS.index(word)


def janus_processor(template: str | None) -> JanusProcessor:
    """Return a processor with one token per word."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + JANUS_WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    )
    images = JanusImageProcessorPil(
        size={"height": JANUS_SIDE, "width": JANUS_SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(images, tokenizer, chat_template=template, num_image_tokens=JANUS_TOKENS)


def janus_model() -> JanusForConditionalGeneration:
    """Return a model whose pictures have 32 x 32 pixels in 4 x 4 tokens."""
    torch.manual_seed(0)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(SPECIAL + JANUS_WORDS),
            hidden_size=_HIDDEN,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=JANUS_SIDE,
            patch_size=8,
            projection_dim=_HIDDEN,
            num_image_tokens=JANUS_TOKENS,
            initializer_range=0.2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=JANUS_CODES,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=1,
            projection_dim=_HIDDEN,
            image_token_embed_dim=_HIDDEN,
            initializer_range=0.2,
        ),
        image_token_id=6,
    )
    return JanusForConditionalGeneration(config).eval()
