"""Write a small LLaVA: a vision-language model of transformers that is none of the families."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny_checkpoints.common import WORDS, livelier, tokenizer

_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def llava(
    directory: Path, seed: int = 0, template: bool = True, more_words: Sequence[str] = ()
) -> Path:
    """Write a checkpoint, with or without a chat template, and with ``more_words`` to say."""
    named = {"pad_token": "<pad>", "eos_token": "</s>"}
    extra = {"image_token": "<image>"}
    special = ["<pad>", "</s>", "<unk>", "<image>"]
    words = tokenizer(special, [*WORDS, *more_words], **named, extra_special_tokens=extra)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE if template else None,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        ),
        image_token_index=3,
        image_token_id=3,
    )
    livelier(LlavaForConditionalGeneration(config), seed).save_pretrained(directory)
    return directory
