"""Write a small Emu3."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from tests.tiny_checkpoints.common import WORDS, livelier, tokenizer

EMU3_CODES, EMU3_SIDE = 64, 4
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def emu3(directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint whose pictures have 32 x 32 pixels in 4 x 4 tokens."""
    words = _tokenizer()
    images = Emu3ImageProcessor(
        min_pixels=16 * 16, max_pixels=64 * 64, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    Emu3Processor(images, words, chat_template=_TEMPLATE).save_pretrained(directory)
    vocabulary = words.get_vocab()
    config = Emu3Config(
        vq_config={
            "codebook_size": EMU3_CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
        },
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": vocabulary["<|endoftext|>"],
            "bos_token_id": vocabulary["<|extra_203|>"],
            "eos_token_id": vocabulary["<|extra_204|>"],
        },
        vocabulary_map=vocabulary,
        image_area=32 * 32,
    )
    livelier(Emu3ForConditionalGeneration(config), seed).save_pretrained(directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    visual = [f"<|visual token {i:06d}|>" for i in range(EMU3_CODES)]
    named = {
        "pad_token": "<|endoftext|>",
        "bos_token": "<|extra_203|>",
        "eos_token": "<|extra_204|>",
    }
    extra = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
        "eol_token": "<|extra_200|>",
    }
    special = ["<unk>", *named.values(), *extra.values()]
    return tokenizer(special, [*WORDS, *visual], **named, extra_special_tokens=extra)
