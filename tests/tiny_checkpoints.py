"""Small randomly initialised checkpoints of every family's true architecture, in the layout that
is published.
"""

from __future__ import annotations

import json
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
    CLIPVisionConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from isic_ray.models.conversion import convert_llamagen, read_published, write_safetensors

_TEXT = """
a red blue cat dog knife gun on the table with and of yes no ? : is there in picture rewrite safely does this show
weapon gore black white spoon 4*4 lowres, USER: ASSISTANT:
"""
WORDS = _TEXT.split()


def tokenizer(special: list[str], words: list[str], **named: object) -> PreTrainedTokenizerFast:
    """One token a word; ``special`` come first."""
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", padding_side="left", **named
    )


def livelier(model: nn.Module, seed: int) -> nn.Module:
    """Larger random weights, so that logits and pictures differ visibly from sample to sample."""
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
    images = Emu3ImageProcessor(
        min_pixels=16 * 16, max_pixels=64 * 64, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
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


CHAMELEON_CODES, CHAMELEON_SIDE = 64, 4


def chameleon(directory: Path, seed: int = 0, decoder: bool = True) -> Path:
    """Pictures of 32 x 32 pixels in 4 x 4 tokens. ``tokenizer/vqgan.ckpt`` lies there as
    published, a pickle.
    """
    picture_words = [
        f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(i))}Z"
        for i in range(CHAMELEON_CODES)
    ]
    named = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "<reserved08706>",
        "extra_special_tokens": {
            "image_token": "<image>",
            "boi_token": "<racm3:break>",
            "eoi_token": "<eoss>",
        },
    }
    special = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<reserved08706>",
        "<image>",
        "<racm3:break>",
        "<eoss>",
    ]
    words = tokenizer(special, [*picture_words, *WORDS], **named)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
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
        vqgan = TamingDecoder(config.vq_config)
        livelier(vqgan, seed + 1)
        published = {f"decoder.{name}": value for name, value in vqgan.state_dict().items()}
        published |= {f"{name}": value for name, value in model.model.vqmodel.state_dict().items()}
        (directory / "tokenizer").mkdir(exist_ok=True)
        torch.save(
            {"state_dict": published, "global_step": 7}, directory / "tokenizer" / "vqgan.ckpt"
        )
        write_safetensors(
            read_published(directory / "tokenizer" / "vqgan.ckpt"), directory / "vqgan.safetensors"
        )
    return directory


class TamingDecoder(nn.Module):
    """The VQGAN decoder as its paper and configuration describe it, written for clarity: a
    reference.

    Levels are numbered from the highest resolution, so the decoder walks them backwards.
    """

    def __init__(self, config: ChameleonVQVAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.channel_multiplier]
        top = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, top, 3, padding=1)
        self.mid = nn.ModuleDict(
            {
                "block_1": _residual(config, top, top),
                "attn_1": _attention(top),
                "block_2": _residual(config, top, top),
            }
        )
        levels, before = [], top
        for level in reversed(range(len(widths))):
            blocks = [
                _residual(config, before if n == 0 else widths[level], widths[level])
                for n in range(2)
            ]
            parts = {"block": nn.ModuleList(blocks), "attn": nn.ModuleList()}
            if level > 0:
                parts["upsample"] = nn.ModuleDict(
                    {"conv": nn.Conv2d(widths[level], widths[level], 3, padding=1)}
                )
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


LLAMAGEN_CODES, LLAMAGEN_SIDE, LLAMAGEN_HEADS, LLAMAGEN_PREFIX = 64, 4, 4, 12


def llamagen_published(directory: Path, seed: int = 0) -> Path:
    """``t2i.pt`` and ``vq.pt`` as published (pickles), and a T5 directory ``t5``; pictures of 32
    x 32 pixels.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({"model": llamagen_transformer(seed)}, directory / "t2i.pt")
    torch.save({"model": llamagen_tokenizer(seed), "steps": 3}, directory / "vq.pt")
    named = {"pad_token": "<pad>", "eos_token": "</s>"}
    words = tokenizer(["<pad>", "</s>", "<unk>"], WORDS, **named)
    words.padding_side = "right"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.eos_token_id)]
    )
    words.save_pretrained(directory / "t5")
    config = T5Config(
        vocab_size=len(words),
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    livelier(T5EncoderModel(config), seed).save_pretrained(directory / "t5")
    return directory


def llamagen(directory: Path, seed: int = 0) -> Path:
    """The same, converted."""
    published = llamagen_published(directory / "published", seed)
    to = directory / "converted"
    convert_llamagen(
        published / "t2i.pt", published / "vq.pt", published / "t5", to, 32, LLAMAGEN_HEADS
    )
    return to


def llamagen_transformer(
    seed: int, width: int = 64, layers: int = 2, hidden: int = 96
) -> dict[str, Tensor]:
    """Random tensors by LlamaGen's published names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 1.4 / columns**0.5

    tensors = {
        "tok_embeddings.weight": torch.randn(LLAMAGEN_CODES, width, generator=generator),
        "norm.weight": torch.ones(width),
        "output.weight": linear(LLAMAGEN_CODES, width),
        "cls_embedding.uncond_embedding": torch.randn(LLAMAGEN_PREFIX, 48, generator=generator),
        "cls_embedding.cap_proj.fc1.weight": linear(width, 48),
        "cls_embedding.cap_proj.fc2.weight": linear(width, width),
    }
    for layer in range(layers):
        tensors |= {
            f"layers.{layer}.attention.wqkv.weight": linear(3 * width, width),
            f"layers.{layer}.attention.wo.weight": linear(width, width),
            f"layers.{layer}.feed_forward.w1.weight": linear(hidden, width),
            f"layers.{layer}.feed_forward.w3.weight": linear(hidden, width),
            f"layers.{layer}.feed_forward.w2.weight": linear(width, hidden),
            f"layers.{layer}.attention_norm.weight": 1
            + 0.1 * torch.randn(width, generator=generator),
            f"layers.{layer}.ffn_norm.weight": 1 + 0.1 * torch.randn(width, generator=generator),
        }
    return tensors


def llamagen_tokenizer(
    seed: int, base: int = 32, latent: int = 32, code: int = 8
) -> dict[str, Tensor]:
    """Random tensors by the published tokenizer's names and shapes (multipliers 1, 1, 1, 2; one
    block a level).
    """
    generator, tensors = torch.Generator().manual_seed(seed + 1), {}
    widths = [base, base, base, 2 * base]

    def conv(name: str, before: int, after: int, size: int = 3) -> None:
        tensors[f"{name}.weight"] = (
            torch.randn(after, before, size, size, generator=generator) * 1.4 / before**0.5 / size
        )
        tensors[f"{name}.bias"] = 0.1 * torch.randn(after, generator=generator)

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def residual(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", before, after)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after)
        if before != after:
            conv(f"{name}.nin_shortcut", before, after, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.0", width, width)
        attention(f"{name}.1", width)
        residual(f"{name}.2", width, width)

    conv("encoder.conv_in", 3, base)
    for level, width in enumerate(widths):
        residual(f"encoder.conv_blocks.{level}.res.0", widths[max(level - 1, 0)], width)
        if level == len(widths) - 1:
            attention(f"encoder.conv_blocks.{level}.attn.0", width)
        else:
            conv(f"encoder.conv_blocks.{level}.downsample.conv", width, width)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], latent)
    conv("quant_conv", latent, code, 1)
    conv("post_quant_conv", code, latent, 1)
    conv("decoder.conv_in", latent, widths[-1])
    middle("decoder.mid", widths[-1])
    before = widths[-1]
    for step, width in enumerate(reversed(widths)):
        for block in range(2):
            residual(f"decoder.conv_blocks.{step}.res.{block}", before, width)
            if step == 0:
                attention(f"decoder.conv_blocks.{step}.attn.{block}", width)
            before = width
        if step < len(widths) - 1:
            conv(f"decoder.conv_blocks.{step}.upsample.conv", width, width)
    norm("decoder.norm_out", base)
    conv("decoder.conv_out", base, 3)
    tensors["quantize.embedding.weight"] = torch.randn(LLAMAGEN_CODES, code, generator=generator)
    tensors["quantize.codebook_used"] = torch.zeros(16)
    return tensors


def llava(directory: Path, seed: int = 0, template: bool = True) -> Path:
    """A vision-language model of transformers that is no family of ours."""
    chat = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    named = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    words = tokenizer(["<pad>", "</s>", "<unk>", "<image>"], WORDS, **named)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=chat if template else None,
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


VILAU_CODES, VILAU_SIDE, VILAU_DEPTH = 32, 4, 3


def vila_u(directory: Path, seed: int = 0) -> Path:
    """Pictures of 32 x 32 pixels in 4 x 4 positions of 3 tokens, in the published layout of
    three directories.
    """
    generator, width, code, depth_width = torch.Generator().manual_seed(seed), 64, 32, 48
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    words = tokenizer(["<unk>", "<s>", "</s>", "<im_start>", "<im_end>"], WORDS, **named)
    words.save_pretrained(directory / "llm")
    llm = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    livelier(LlamaForCausalLM(llm), seed).save_pretrained(directory / "llm")

    eyes = SiglipVisionConfig(
        hidden_size=code,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    tower = {
        f"rqvaesiglip.siglip_model.vision_model.{name}": value
        for name, value in livelier(SiglipVisionModel(eyes), seed).state_dict().items()
    }
    ddconfig = {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": [1, 1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        "in_channels": 3,
        "resolution": 32,
        "z_channels": 32,
    }
    vq = ChameleonVQVAEConfig(
        latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1, 2], num_res_blocks=1
    )
    decoder = livelier(TamingDecoder(vq), seed + 1)
    tower |= {f"rqvaesiglip.decoder.{name}": value for name, value in decoder.state_dict().items()}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 1.4 / shape[-1] ** 0.5

    table = torch.randn(VILAU_CODES + 1, code, generator=generator)
    table[-1] = 0  # the padding row
    tower |= {
        f"rqvaesiglip.quantizer.codebooks.{depth}.weight": table.clone()
        for depth in range(VILAU_DEPTH)
    }
    tower |= {
        "rqvaesiglip.post_quant_conv.weight": random(32, code)[:, :, None, None],
        **_bias("rqvaesiglip.post_quant_conv", 32),
    }
    shapes = {"in_mlp_1": (depth_width, code), "in_mlp_2": (depth_width, width)}
    for block in range(2):
        at = f"head_transformer.blocks.{block}"
        shapes |= {
            f"{at}.attn.{name}": (depth_width, depth_width)
            for name in ("key", "query", "value", "proj")
        }
        shapes |= {
            f"{at}.mlp.0": (4 * depth_width, depth_width),
            f"{at}.mlp.2": (depth_width, 4 * depth_width),
        }
        for norm in ("ln1", "ln2"):
            tower |= {
                f"rqtransformer.{at}.{norm}.weight": torch.ones(depth_width),
                **_bias(f"rqtransformer.{at}.{norm}", depth_width),
            }
    shapes["classifier_mlp.linear"] = (VILAU_CODES, depth_width)
    tower |= {"rqtransformer.classifier_mlp.layer_norm.weight": torch.ones(depth_width)}
    tower |= _bias("rqtransformer.classifier_mlp.layer_norm", depth_width)
    for name, shape in shapes.items():
        tower |= {
            f"rqtransformer.{name}.weight": random(*shape),
            **_bias(f"rqtransformer.{name}", shape[0]),
        }
    tower["rqtransformer.pos_emb_d"] = torch.randn(1, VILAU_DEPTH, depth_width, generator=generator)
    write_safetensors(tower, directory / "vision_tower" / "model.safetensors")
    write_json(
        directory / "vision_tower" / "config.json",
        {
            "model_type": "rqvaesigliptransformer_model",
            "hidden_size": code,
            "rqvaesiglip": {
                "embed_dim": code,
                "n_embed": VILAU_CODES,
                "latent_shape": [VILAU_SIDE, VILAU_SIDE, code],
                "code_shape": [VILAU_SIDE, VILAU_SIDE, VILAU_DEPTH],
                "shared_codebook": True,
                "ddconfig": ddconfig,
                "decoder_latent_shape": None,
                "vision_heads": 2,
            },
            "rqtransformer": {
                "block_size": [VILAU_SIDE, VILAU_SIDE, VILAU_DEPTH],
                "input_embed_dim_1": code,
                "input_embed_dim_2": width,
                "embed_dim": depth_width,
                "vocab_size": VILAU_CODES,
                "head": {"n_layer": 2, "block": {"n_head": 4}},
            },
        },
    )
    projector = {"layers.0.weight": random(width, code), **_bias("layers.0", width)}
    projector |= {"layers.2.weight": random(width, width), **_bias("layers.2", width)}
    write_safetensors(projector, directory / "mm_projector" / "model.safetensors")
    write_json(directory / "mm_projector" / "config.json", {"mm_projector_type": "mlp2x_gelu"})
    write_json(directory / "config.json", {"model_type": "vila_u_llama"})
    return directory


def _bias(name: str, width: int) -> dict[str, Tensor]:
    return {
        f"{name}.bias": 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(width))
    }


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
