"""Write a small Chameleon, with or without its picture decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import processors
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from isic_ray.models.conversion import read_published, write_safetensors
from tests.tiny_checkpoints.common import WORDS, livelier, tokenizer
from tests.tiny_checkpoints.taming_decoder import TamingDecoder

CHAMELEON_CODES, CHAMELEON_SIDE = 64, 4


def chameleon(directory: Path, seed: int = 0, decoder: bool = True) -> Path:
    """Write a checkpoint whose pictures have 32 x 32 pixels in 4 x 4 tokens.

    With ``decoder``, the published pickle ``tokenizer/vqgan.ckpt`` is there too, and converted.
    """
    words = _tokenizer()
    images = ChameleonImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    ChameleonProcessor(images, words, image_seq_length=CHAMELEON_SIDE**2).save_pretrained(directory)
    vocabulary = words.get_vocab()
    config = ChameleonConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
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
        _write_decoder(directory, model.model.vqmodel, TamingDecoder(config.vq_config), seed)
    return directory


def _write_decoder(directory: Path, vqmodel: nn.Module, decoder: nn.Module, seed: int) -> None:
    livelier(decoder, seed + 1)
    published = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    published |= vqmodel.state_dict()
    ckpt = directory / "tokenizer" / "vqgan.ckpt"
    ckpt.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": published, "global_step": 7}, ckpt)
    write_safetensors(read_published(ckpt), directory / "vqgan.safetensors")


def _tokenizer() -> PreTrainedTokenizerFast:
    picture_words = [
        f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(i))}Z"
        for i in range(CHAMELEON_CODES)
    ]
    named = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "sep_token": "<reserved08706>",
    }
    extra = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    special = ["<s>", "<pad>", "</s>", "<unk>", "<reserved08706>", *extra.values()]
    words = tokenizer(special, [*picture_words, *WORDS], **named, extra_special_tokens=extra)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
    return words
