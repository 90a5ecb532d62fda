"""Write a small VILA-U, in the published layout of three directories."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    ChameleonVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from isic_ray.models.conversion import write_safetensors
from tests.tiny_checkpoints.common import WORDS, livelier, tokenizer, write_json
from tests.tiny_checkpoints.taming_decoder import TamingDecoder

VILAU_CODES, VILAU_SIDE, VILAU_DEPTH = 32, 4, 3
_WIDTH = 64  # of the LLaMA
_CODE = 32  # of a codebook row
_DEPTH_WIDTH = 48  # of the depth transformer
_BLOCKS = 2
_TOWER_CONFIG = {
    "model_type": "rqvaesigliptransformer_model",
    "hidden_size": _CODE,
    "rqvaesiglip": {
        "embed_dim": _CODE,
        "n_embed": VILAU_CODES,
        "latent_shape": [VILAU_SIDE, VILAU_SIDE, _CODE],
        "code_shape": [VILAU_SIDE, VILAU_SIDE, VILAU_DEPTH],
        "shared_codebook": True,
        "ddconfig": {
            "ch": 32,
            "out_ch": 3,
            "ch_mult": [1, 1, 1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
            "in_channels": 3,
            "resolution": 32,
            "z_channels": 32,
        },
        "decoder_latent_shape": None,
        "vision_heads": 2,
    },
    "rqtransformer": {
        "block_size": [VILAU_SIDE, VILAU_SIDE, VILAU_DEPTH],
        "input_embed_dim_1": _CODE,
        "input_embed_dim_2": _WIDTH,
        "embed_dim": _DEPTH_WIDTH,
        "vocab_size": VILAU_CODES,
        "head": {"n_layer": _BLOCKS, "block": {"n_head": 4}},
    },
}


def vila_u(directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint whose pictures have 32 x 32 pixels in 4 x 4 positions of 3 tokens."""
    generator = torch.Generator().manual_seed(seed)
    _write_llm(directory / "llm", seed)
    tower = _eyes(seed) | _decoder(seed) | _codebook(generator) | _depth_transformer(generator)
    write_safetensors(tower, directory / "vision_tower" / "model.safetensors")
    write_json(directory / "vision_tower" / "config.json", _TOWER_CONFIG)
    projector = _linear(generator, "layers.0", _WIDTH, _CODE)
    projector |= _linear(generator, "layers.2", _WIDTH, _WIDTH)
    write_safetensors(projector, directory / "mm_projector" / "model.safetensors")
    write_json(directory / "mm_projector" / "config.json", {"mm_projector_type": "mlp2x_gelu"})
    write_json(directory / "config.json", {"model_type": "vila_u_llama"})
    return directory


def _write_llm(directory: Path, seed: int) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    words = tokenizer(["<unk>", "<s>", "</s>", "<im_start>", "<im_end>"], WORDS, **named)
    words.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    livelier(LlamaForCausalLM(config), seed).save_pretrained(directory)


def _eyes(seed: int) -> dict[str, Tensor]:
    config = SiglipVisionConfig(
        hidden_size=_CODE,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    state = livelier(SiglipVisionModel(config), seed).state_dict()
    return {f"rqvaesiglip.siglip_model.vision_model.{name}": value for name, value in state.items()}


def _decoder(seed: int) -> dict[str, Tensor]:
    config = ChameleonVQVAEConfig(
        latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1, 2], num_res_blocks=1
    )
    state = livelier(TamingDecoder(config), seed + 1).state_dict()
    return {f"rqvaesiglip.decoder.{name}": value for name, value in state.items()}


def _codebook(generator: torch.Generator) -> dict[str, Tensor]:
    table = torch.randn(VILAU_CODES + 1, _CODE, generator=generator)
    table[-1] = 0  # the padding row
    tensors = {
        f"rqvaesiglip.quantizer.codebooks.{depth}.weight": table.clone()
        for depth in range(VILAU_DEPTH)
    }
    name = "rqvaesiglip.post_quant_conv"
    tensors |= _linear(generator, name, 32, _CODE)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, :, None, None]
    return tensors


def _depth_transformer(generator: torch.Generator) -> dict[str, Tensor]:
    width = _DEPTH_WIDTH
    shapes = {"in_mlp_1": (width, _CODE), "in_mlp_2": (width, _WIDTH)}
    norms = ["classifier_mlp.layer_norm"]
    for block in range(_BLOCKS):
        at = f"head_transformer.blocks.{block}"
        parts = ("key", "query", "value", "proj")
        shapes |= {f"{at}.attn.{name}": (width, width) for name in parts}
        shapes |= {f"{at}.mlp.0": (4 * width, width), f"{at}.mlp.2": (width, 4 * width)}
        norms += [f"{at}.ln1", f"{at}.ln2"]
    shapes["classifier_mlp.linear"] = (VILAU_CODES, width)
    tensors: dict[str, Tensor] = {}
    for name in norms:
        tensors |= {
            f"rqtransformer.{name}.weight": torch.ones(width),
            f"rqtransformer.{name}.bias": _bias(width),
        }
    for name, shape in shapes.items():
        tensors |= _linear(generator, f"rqtransformer.{name}", *shape)
    tensors["rqtransformer.pos_emb_d"] = torch.randn(1, VILAU_DEPTH, width, generator=generator)
    return tensors


def _linear(generator: torch.Generator, name: str, rows: int, columns: int) -> dict[str, Tensor]:
    weight = torch.randn((rows, columns), generator=generator) * 1.4 / columns**0.5
    return {f"{name}.weight": weight, f"{name}.bias": _bias(rows)}


def _bias(width: int) -> Tensor:
    return 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(width))
