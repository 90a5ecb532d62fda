"""Share what the small checkpoints have in common: words, a tokenizer, livelier weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

_TEXT = """
a red blue cat dog knife gun on the table with and of yes no ? : is there in picture rewrite safely
does this show weapon gore black white spoon 4*4 lowres, USER: ASSISTANT:
"""
WORDS = _TEXT.split()


def tokenizer(special: list[str], words: list[str], **named: object) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word; ``special`` come first."""
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", padding_side="left", **named
    )


def livelier(model: nn.Module, seed: int) -> nn.Module:
    """Make random weights larger, so that logits and pictures differ from sample to sample."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                scale = 1.0 if "embed" in name else 1.4 / fan_in**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith("bias"):  # a convolution's is random from the start
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
