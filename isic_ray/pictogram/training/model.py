"""Build and save the embedded model: a small `JanusForConditionalGeneration` and its processor."""

from __future__ import annotations

from pathlib import Path

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

from isic_ray.pictogram.draw import IMAGE_SIZE
from isic_ray.pictogram.scene import vocabulary

PATCH = 8  # pixels per side of the patch that one visual token draws
TOKENS = (IMAGE_SIZE // PATCH) ** 2  # 36 visual tokens per picture
CODES, CODE_DIM = 1024, 8
_HIDDEN = 192

PAD, BOS, EOS, UNK, BOI, EOI, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<boi>", "<eoi>", "<image>"
_SPECIAL = [PAD, BOS, EOS, UNK, BOI, EOI, IMAGE]
# `<s> text`, or `<s> <image> question`: no roles, so that sequences stay short.
_CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %} "
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def build_processor() -> JanusProcessor:
    """Return the processor: one token per word, Janus's special tokens, 36 image placeholders."""
    words = {word: i for i, word in enumerate(_SPECIAL + vocabulary())}
    core = Tokenizer(models.WordLevel(words, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI},
    )
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_size=14,
    )
    return JanusProcessor(
        image_processor, tokenizer, chat_template=_CHAT_TEMPLATE, num_image_tokens=TOKENS
    )


def build_model(processor: JanusProcessor) -> JanusForConditionalGeneration:
    """Return a randomly initialised model of the embedded size, about 4 million parameters."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    model = JanusForConditionalGeneration(_config(len(tokenizer), ids))
    for module in model.model.vqmodel.modules():
        if isinstance(module, torch.nn.Conv2d):
            # Janus's N(0, 0.02) starts a VQ from scratch several times slower.
            module.reset_parameters()
    generation = model.generation_config
    generation.pad_token_id = ids[PAD]
    generation.bos_token_id = ids[BOS]
    generation.eos_token_id = ids[EOS]
    generation.generation_kwargs = {"boi_token_id": ids[BOI]}
    # Without this mark, a reload would rebuild the generation config from the model config and lose
    # boi_token_id.
    generation._from_model_config = False
    return model


def _config(words: int, ids: dict[str, int]) -> JanusConfig:
    """Return the architecture for a vocabulary of ``words`` tokens; ``ids`` of the special ones."""
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=words,
            hidden_size=_HIDDEN,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=512,
            pad_token_id=ids[PAD],
            bos_token_id=ids[BOS],
            eos_token_id=ids[EOS],
        ),
        vision_config=JanusVisionConfig(
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=_HIDDEN,
            num_image_tokens=TOKENS,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=CODE_DIM,
            num_embeddings=CODES,
            latent_channels=64,
            # 32 groups are fixed in Janus's GroupNorm: 64 channels leave two per group, so a flat
            # background's colour survives the norm. No residual blocks per level (one in the
            # decoder) keeps that affordable on a CPU.
            base_channels=64,
            channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=0,
            projection_dim=_HIDDEN,
            image_token_embed_dim=_HIDDEN,
        ),
        image_token_id=ids[IMAGE],
    )


def save(model: JanusForConditionalGeneration, processor: JanusProcessor, directory: Path) -> None:
    """Write a checkpoint that stock transformers loads.

    The weights are rounded to float16, which halves the package.
    """
    model.to(torch.float16).save_pretrained(directory)
    processor.save_pretrained(directory)
    model.float()
