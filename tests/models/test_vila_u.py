"""Is the VILA-U adapter what the publication says? On small random weights in its layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, SiglipVisionModel

from isic_ray.codebook import ArtifactMeta, SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.models.base import SamplingSettings, UnifiedModel
from isic_ray.models.families.vila_u import VilaUModel
from isic_ray.models.registry import load_model, read_spec
from isic_ray.testing import UnifiedModelConformance
from tests.tiny_checkpoints import VILAU_CODES, VILAU_DEPTH, VILAU_SIDE, vila_u

PROMPTS = ["a red cat", "a blue dog on the table with a knife", "knife"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
N = VILAU_SIDE**2
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vila_u(tmp_path_factory.mktemp("vila_u"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> VilaUModel:
    loaded = load_model(ModelConfig(str(checkpoint), device="cpu"))
    assert isinstance(loaded, VilaUModel)
    return loaded


@pytest.fixture(scope="module")
def tower(checkpoint: Path) -> Weights:
    return load_file(checkpoint / "vision_tower" / "model.safetensors")


class TestVilaU(UnifiedModelConformance):
    pass


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def depth_logits(weights: Weights, state: Tensor, table: Tensor, drawn: list[int]) -> Tensor:
    """Return logits of the next depth of one position, after its state and the tokens drawn."""
    at = "rqtransformer"
    sums = [table[drawn[: n + 1]].sum(0) for n in range(len(drawn))]
    context = [linear(weights, f"{at}.in_mlp_2", state)]
    context += [linear(weights, f"{at}.in_mlp_1", total) for total in sums]
    x = torch.stack(context) + weights[f"{at}.pos_emb_d"][0, : len(context)]
    for block in range(2):
        name = f"{at}.head_transformer.blocks.{block}"
        y = norm(weights, f"{name}.ln1", x)
        q, k, v = (
            linear(weights, f"{name}.attn.{part}", y).view(len(x), 4, -1)
            for part in ("query", "key", "value")
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        shares = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", shares, v).flatten(1)
        x = x + linear(weights, f"{name}.attn.proj", mixed)
        y = F.gelu(linear(weights, f"{name}.mlp.0", norm(weights, f"{name}.ln2", x)))
        x = x + linear(weights, f"{name}.mlp.2", y)
    last = norm(weights, f"{at}.classifier_mlp.layer_norm", x[-1])
    return linear(weights, f"{at}.classifier_mlp.linear", last)


def published(
    checkpoint: Path, tower: Weights, table: Tensor, prompt: str, guidance: float
) -> list[int]:
    """Draw greedily with one full forward per position, the prompt against an empty one."""
    words = AutoTokenizer.from_pretrained(checkpoint / "llm")
    llm = LlamaForCausalLM.from_pretrained(checkpoint / "llm")
    projector = load_file(checkpoint / "mm_projector" / "model.safetensors")
    texts = [f"{SYSTEM}USER: {prompt} ASSISTANT: <im_start>", f"{SYSTEM}USER:ASSISTANT: <im_start>"]
    ids = [[1, *words(text, add_special_tokens=False)["input_ids"]] for text in texts]
    fed = [llm.model.embed_tokens(torch.tensor(row)) for row in ids]
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(N):
            given, free = (
                llm.model(inputs_embeds=rows[None]).last_hidden_state[0, -1] for rows in fed
            )
            drawn: list[int] = []
            for _ in range(VILAU_DEPTH):
                with_prompt, without = (
                    depth_logits(tower, state, table, drawn) for state in (given, free)
                )
                drawn.append(int((without + guidance * (with_prompt - without)).argmax()))
            tokens += drawn
            y = F.gelu(linear(projector, "layers.0", table[drawn].sum(0)))
            y = linear(projector, "layers.2", y)
            fed = [torch.cat([rows, y[None]]) for rows in fed]
    return tokens


def test_greedy_tokens_equal_the_published_procedure(
    model: VilaUModel, checkpoint: Path, tower: Weights
) -> None:
    expected = [published(checkpoint, tower, model.codebook, prompt, 3.0) for prompt in PROMPTS[:2]]
    found = model.sample(PROMPTS[:2], [0, 1], SamplingSettings(guidance=3.0, temperature=0))
    assert found.tolist() == expected
    assert len(found.unique()) > 3


def test_an_edit_changes_what_is_drawn(model: VilaUModel, checkpoint: Path, tower: Weights) -> None:
    edited = model.codebook + torch.randn(
        model.codebook.shape, generator=torch.Generator().manual_seed(2)
    )
    settings = SamplingSettings(guidance=3.0, temperature=0)
    base = model.sample(PROMPTS[:1], [0], settings)
    found = model.sample(PROMPTS[:1], [0], settings, edited)
    assert not torch.equal(found, base)
    assert found[0].tolist() == published(checkpoint, tower, edited, PROMPTS[0], 3.0)
    assert torch.equal(model.sample(PROMPTS[:1], [0], settings), base)


def test_pictures_are_read_depth_by_depth(model: VilaUModel, tower: Weights) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    eyes: SiglipVisionModel = model._eyes  # type: ignore[assignment]
    with torch.no_grad():
        x = eyes.embeddings(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
        for layer in list(eyes.encoder.layers)[:-1]:
            out = layer(x, None)
            x = out[0] if isinstance(out, tuple) else out
    rest, expected = x, []
    for _ in range(VILAU_DEPTH):
        codes = torch.cdist(rest, model.codebook[None]).argmin(-1)
        expected.append(codes)
        rest = rest - model.codebook[codes]
    assert torch.equal(model.encode(images).long(), torch.stack(expected, -1).flatten(1))


def test_the_padding_row_is_no_part_of_the_table_and_stays(
    model: VilaUModel, tower: Weights, checkpoint: Path, tmp_path: Path
) -> None:
    names = [name for name in tower if "codebooks" in name]
    assert (len(names), len(tower[names[0]]), len(model.codebook)) == (
        VILAU_DEPTH,
        VILAU_CODES + 1,
        VILAU_CODES,
    )
    spec = read_spec(ModelConfig(str(checkpoint)))
    assert torch.equal(spec.codebook, model.codebook)
    assert spec.tokens_depend_on_codebook
    edited = model.codebook + 1
    model.export(
        SafeCodebook.from_tables(model.codebook, edited, ArtifactMeta("test", "vila-u")), tmp_path
    )
    written = load_file(tmp_path / "vision_tower" / "model.safetensors")
    for name in names:
        assert torch.equal(written[name][:-1], edited)
        assert torch.equal(written[name][-1], tower[name][-1])
    again: UnifiedModel = load_model(ModelConfig(str(tmp_path), device="cpu"))
    assert torch.equal(again.codebook, edited)
