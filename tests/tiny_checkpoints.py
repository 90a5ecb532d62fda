"""Small randomly initialised checkpoints of every family's true architecture, in the layout that is published."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

WORDS = (
    "a red blue cat dog knife gun on the table with and of yes no ? : is there in picture rewrite safely does this "
    "show weapon gore black white spoon 4*4 lowres, USER: ASSISTANT:"
).split()


def tokenizer(special: list[str], words: list[str], **named: object) -> PreTrainedTokenizerFast:
    """One token a word; ``special`` come first."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", padding_side="left", **named)


def livelier(model: nn.Module, seed: int) -> nn.Module:
    """Larger random weights, so that logits and pictures differ visibly from sample to sample."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                scale = 1.0 if "embed" in name else 1.4 / fan_in**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


EMU3_CODES, EMU3_SIDE = 64, 4
EMU3_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def emu3(directory: Path, seed: int = 0) -> Path:
    """Pictures of 32 x 32 pixels in 4 x 4 tokens."""
    visual = [f"<|visual token {i:06d}|>" for i in range(EMU3_CODES)]
    named = {
        "pad_token": "<|endoftext|>",
        "bos_token": "<|extra_203|>",
        "eos_token": "<|extra_204|>",
        "extra_special_tokens": {
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
            "eol_token": "<|extra_200|>",
        },
    }
    special = ["<unk>", *(str(value) for value in named.values() if isinstance(value, str))]
    special += list(named["extra_special_tokens"].values())  # type: ignore[attr-defined]
    words = tokenizer(special, [*WORDS, *visual], **named)
    vocabulary = words.get_vocab()
    images = Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=64 * 64, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Emu3Processor(images, words, chat_template=EMU3_TEMPLATE).save_pretrained(directory)
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
            "max_position_embeddings": 160,
            "pad_token_id": vocabulary["<|endoftext|>"],
            "bos_token_id": vocabulary["<|extra_203|>"],
            "eos_token_id": vocabulary["<|extra_204|>"],
        },
        vocabulary_map=vocabulary,
        image_area=32 * 32,
    )
    livelier(Emu3ForConditionalGeneration(config), seed).save_pretrained(directory)
    return directory
