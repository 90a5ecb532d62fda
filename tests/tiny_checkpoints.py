"""Small randomly initialised checkpoints of every family's true architecture, in the layout that is published."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    ChameleonVQVAEConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from isic_ray.models.conversion import read_published, write_safetensors

_TEXT = """
a red blue cat dog knife gun on the table with and of yes no ? : is there in picture rewrite safely does this show
weapon gore black white spoon 4*4 lowres, USER: ASSISTANT:
"""
WORDS = _TEXT.split()


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


CHAMELEON_CODES, CHAMELEON_SIDE = 64, 4


def chameleon(directory: Path, seed: int = 0, decoder: bool = True) -> Path:
    """Pictures of 32 x 32 pixels in 4 x 4 tokens. ``tokenizer/vqgan.ckpt`` lies there as published, a pickle."""
    picture_words = [
        f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(i))}Z" for i in range(CHAMELEON_CODES)
    ]
    named = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "<reserved08706>",
        "extra_special_tokens": {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
    }
    special = ["<s>", "<pad>", "</s>", "<unk>", "<reserved08706>", "<image>", "<racm3:break>", "<eoss>"]
    words = tokenizer(special, [*picture_words, *WORDS], **named)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
    images = ChameleonImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ChameleonProcessor(images, words, image_seq_length=CHAMELEON_SIDE**2).save_pretrained(directory)
    vocabulary = words.get_vocab()
    config = ChameleonConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        vocabulary_map=vocabulary,
        vq_config={
            "embed_dim": 16,
            "num_embeddings": CHAMELEON_CODES,
            "latent_channels": 32,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 2],
            "num_res_blocks": 1,
        },
    )
    model = livelier(ChameleonForConditionalGeneration(config), seed)
    model.save_pretrained(directory)
    if decoder:
        vqgan = TamingDecoder(config.vq_config)
        livelier(vqgan, seed + 1)
        published = {f"decoder.{name}": value for name, value in vqgan.state_dict().items()}
        published |= {f"{name}": value for name, value in model.model.vqmodel.state_dict().items()}
        (directory / "tokenizer").mkdir(exist_ok=True)
        torch.save({"state_dict": published, "global_step": 7}, directory / "tokenizer" / "vqgan.ckpt")
        write_safetensors(read_published(directory / "tokenizer" / "vqgan.ckpt"), directory / "vqgan.safetensors")
    return directory


class TamingDecoder(nn.Module):
    """The VQGAN decoder as its paper and configuration describe it, written for clarity: a reference.

    Levels are numbered from the highest resolution, so the decoder walks them backwards.
    """

    def __init__(self, config: ChameleonVQVAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.channel_multiplier]
        top = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, top, 3, padding=1)
        self.mid = nn.ModuleDict(
            {"block_1": _residual(config, top, top), "attn_1": _attention(top), "block_2": _residual(config, top, top)}
        )
        levels, before = [], top
        for level in reversed(range(len(widths))):
            blocks = [_residual(config, before if n == 0 else widths[level], widths[level]) for n in range(2)]
            parts = {"block": nn.ModuleList(blocks), "attn": nn.ModuleList()}
            if level > 0:
                parts["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(widths[level], widths[level], 3, padding=1)})
            levels.insert(0, nn.ModuleDict(parts))
            before = widths[level]
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](self.conv_in(z))))
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def _residual(config: ChameleonVQVAEConfig, before: int, after: int) -> nn.Module:
    return ChameleonVQVAEEncoderResnetBlock(config, in_channels=before, out_channels=after)


def _attention(width: int) -> nn.Module:
    return ChameleonVQVAEEncoderAttnBlock(width)
