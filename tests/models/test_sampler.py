"""Does the decoding loop agree with transformers, sample the right law, ignore the batching?"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from isic_ray.models.base import SamplingSettings
from isic_ray.models.decoding.backbone import Backbone, KVRun
from isic_ray.models.decoding.blocks import blocks, left_pad
from isic_ray.models.decoding.choice import filter_scores, inverse_cdf
from isic_ray.models.decoding.network import StockNetwork
from isic_ray.models.decoding.picture_sampler import PictureSampler, one_token
from isic_ray.models.decoding.sampler import TokenSampler, _Block
from isic_ray.models.decoding.text import complete_greedily

VOCAB, CODES, HIDDEN, TOKENS, PAD = 40, 512, 64, 16, 0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def llama(kv_heads: int = 2, bias: bool = False) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attention_bias=bias,
        mlp_bias=bias,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = LlamaModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def sampler() -> TokenSampler:
    backbone = Backbone(llama())
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(CODES, HIDDEN, generator=generator) * 0.2
    table = torch.randn(CODES, HIDDEN, generator=generator)
    return TokenSampler(
        backbone,
        table,
        torch.tanh,
        lambda x: x @ head.T,
        tokens=TOKENS,
        pad_id=PAD,
        kept_ids=[1, 2],
    )


def random_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 24, (count,), generator=generator).tolist()
    return [[1, *torch.randint(3, VOCAB, (n,), generator=generator).tolist(), 2] for n in lengths]


@pytest.mark.parametrize(("kv_heads", "bias"), [(4, False), (2, False), (1, True)])
def test_hidden_states_equal_llama(kv_heads: int, bias: bool) -> None:
    model = llama(kv_heads, bias)
    prompts = [[1, 5, 6, 2], [1, 9, 2], [1, 7, 7, 8, 9, 2]]
    expected = [model(torch.tensor([p])).last_hidden_state[0, -1] for p in prompts]
    extended = [model(torch.tensor([[*p, 11, 12]])).last_hidden_state[0, -2:] for p in prompts]
    backbone = Backbone(model)
    ids, pads = left_pad(prompts, 16, PAD, torch.device("cpu"))
    run = KVRun(backbone, pads, 20)
    torch.testing.assert_close(
        run.extend(backbone.embedding[ids]), torch.stack(expected), atol=1e-4, rtol=1e-4
    )
    for step, token in enumerate((11, 12)):  # one by one
        hidden = run.extend(backbone.embedding[torch.full((3, 1), token)])
        torch.testing.assert_close(
            hidden, torch.stack([e[step] for e in extended]), atol=1e-4, rtol=1e-4
        )
    run.filled = 16  # again, both at once
    hidden = run.extend(backbone.embedding[torch.tensor([[11, 12]] * 3)])
    torch.testing.assert_close(hidden, torch.stack([e[1] for e in extended]), atol=1e-4, rtol=1e-4)
    after = [model(torch.tensor([p])).last_hidden_state[0, -1] for p in prompts]
    # the module still works
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (SamplingSettings(guidance=3.0), (1, 7, 64)),
        (SamplingSettings(guidance=3.0, guidance_until=0.4), (1, 7, 64)),
        (SamplingSettings(guidance=1.0), (7,)),
        (SamplingSettings(guidance=2.0, temperature=0.8, top_k=100, top_p=0.9), (7,)),
    ],
)
def test_rows_do_not_depend_on_the_batch(
    settings: SamplingSettings, sizes: tuple[int, ...]
) -> None:
    model, prompts = sampler(), random_prompts(70)
    seeds = [7 * i for i in range(70)]
    whole = model.draw(prompts, seeds, settings)
    assert whole.dtype == torch.int32
    assert whole.shape == (70, TOKENS)
    for size in sizes:
        parts = [
            model.draw(prompts[i : i + size], seeds[i : i + size], settings)
            for i in range(0, 70, size)
        ]
        assert torch.equal(torch.cat(parts), whole), f"batch size {size}"
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = model.draw([prompts[i] for i in order], [seeds[i] for i in order], settings)
    assert torch.equal(shuffled, whole[order])


def test_seeds_matter_and_repeat() -> None:
    model, settings = sampler(), SamplingSettings(guidance=1.0)
    first, second, again = model.draw([[1, 5, 2]] * 3, [10, 11, 10], settings)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_first_token_follows_the_softmax() -> None:
    model = sampler()
    prompt, draws = [1, 5, 6, 2], 600
    ids, pads = left_pad([prompt], 16, PAD, torch.device("cpu"))
    hidden = KVRun(model.backbone, pads, 20).extend(model.backbone.embedding[ids])
    logits = model.head(model.features(hidden))
    probabilities = logits.double().softmax(-1)[0]
    model.tokens = 1
    drawn = model.draw([prompt] * draws, range(draws), SamplingSettings(guidance=1.0))[:, 0].long()
    coarse = torch.arange(CODES) // 64  # 8 bins
    observed = torch.bincount(coarse[drawn], minlength=8).double()
    expected = torch.zeros(8, dtype=torch.float64).index_add_(0, coarse, probabilities) * draws
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 < 24.3  # 99.9 % of chi-square with 7 degrees of freedom


def test_inverse_cdf_is_exact() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.5, 0.25, 0.0]], dtype=torch.float64)
    scores = probabilities.log()
    almost_one = 1 - 2.0**-52
    for uniform, token in [(0.0, 1), (0.24, 1), (0.26, 2), (0.74, 2), (0.76, 3), (almost_one, 3)]:
        assert inverse_cdf(scores, torch.tensor([[uniform]], dtype=torch.float64)).item() == token


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (0, 0.7), (20, 0.5), (1, 1.0), (0, 1e-6), (999, 1.0)]
)
def test_filters_equal_transformers(top_k: int, top_p: float) -> None:
    scores = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 2
    expected: Tensor = scores
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filter_scores(scores, top_k, top_p), expected)


def test_text_is_greedy_and_stops() -> None:
    model = llama()
    head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5))
    prompts, limit = random_prompts(20), 12

    def one_by_one(prompt: list[int], stop: int) -> list[int]:
        ids = list(prompt)
        for _ in range(limit):
            chosen = int((model(torch.tensor([ids])).last_hidden_state[0, -1] @ head.T).argmax())
            if chosen == stop:
                break
            ids.append(chosen)
        return ids[len(prompt) :]

    stop = one_by_one(prompts[0], -1)[3]
    expected = [one_by_one(prompt, stop) for prompt in prompts]
    assert any(len(row) < limit for row in expected)
    found = complete_greedily(
        Backbone(model), lambda x: x @ head.T, prompts, pad_id=PAD, stop_ids=[stop], limit=limit
    )
    assert found == expected


def test_blocks_are_full_and_by_width() -> None:
    found = list(blocks([3, 20, 5, 16, 17, 64], 2))
    assert found == [(16, [0, 2]), (16, [3, 3]), (32, [1, 4]), (64, [5, 5])]
    assert list(blocks([], 4)) == []


def test_bad_arguments_are_refused() -> None:
    model = sampler()
    with pytest.raises(ValueError, match="seeds"):
        model.draw([[1, 2]], [], SamplingSettings())
    with pytest.raises(ValueError, match="top_p"):
        model.draw([[1, 2]], [0], SamplingSettings(top_p=0.0))
    assert model.draw([], [], SamplingSettings()).shape == (0, TOKENS)


def test_bfloat16_runs_and_ignores_the_batch() -> None:
    model = llama().to(torch.bfloat16)
    head = torch.randn(CODES, HIDDEN).to(torch.bfloat16)
    drawer = TokenSampler(
        Backbone(model),
        head,
        torch.tanh,
        lambda x: x @ head.T,
        tokens=TOKENS,
        pad_id=PAD,
        kept_ids=[1, 2],
    )
    drawer.block = 4
    prompts, settings = random_prompts(6), SamplingSettings(guidance=3.0)
    whole = drawer.draw(prompts, range(6), settings)
    assert torch.equal(whole[5:], drawer.draw(prompts[5:], [5], settings))


def test_blocks_of_many_sizes_agree_or_only_one_is_used() -> None:
    model = sampler()
    sizes, multiple = model._sizes(SamplingSettings(guidance=3.0), 20)
    assert (sizes, multiple) == ((64, 2) if model.elastic() else (16, 16))
    prompts, settings = random_prompts(20), SamplingSettings(guidance=3.0)
    for rows in {0, 4, model.elastic()}:  # the others as on CPUs that fail the trials
        model._elastic[torch.get_num_threads()] = rows
        whole = model.draw(prompts, range(20), settings)
        assert torch.equal(model.draw(prompts[19:], [19], settings), whole[19:])


@pytest.mark.parametrize(("guidance", "until"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.5)])
def test_attending_to_masked_slots_changes_no_token(guidance: float, until: float) -> None:
    """As a CUDA graph does: more slots than are filled, the rest masked, all state in tensors."""
    model, prompts = sampler(), random_prompts(12)
    settings = SamplingSettings(guidance=guidance, temperature=0, guidance_until=until)
    expected = model.draw(prompts, range(12), settings)
    model.span = 24
    assert torch.equal(model.draw(prompts, range(12), settings), expected)


def test_guidance_ends_where_it_is_told_to() -> None:
    """Tokens as with guidance up to there, then those that follow them without it."""
    model, prompts, until = sampler(), random_prompts(6), 6
    half = SamplingSettings(guidance=3.0, temperature=0, guidance_until=until / TOKENS)
    found = model.draw(prompts, range(6), half).long()
    whole = model.draw(prompts, range(6), replace(half, guidance_until=1.0)).long()
    assert torch.equal(found[:, :until], whole[:, :until])
    assert not torch.equal(found, whole)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert torch.equal(tokens[until:], follow(model, prompt, tokens))


def follow(model: TokenSampler, prompt: list[int], tokens: Tensor, until: int = 6) -> Tensor:
    """Return the likeliest token without guidance at every position from ``until`` on.

    Each is given ``tokens`` before it.
    """
    read = model.backbone.embedding[torch.tensor(prompt)]
    likeliest = []
    for position in range(until, TOKENS):
        run = KVRun(model.backbone, torch.zeros(1, dtype=torch.long), 64)
        hidden = run.extend(torch.cat([read, model.table[tokens[:position]]])[None])
        likeliest.append(model.head(model.features(hidden)).argmax(-1))
    return torch.cat(likeliest)


@pytest.mark.parametrize("network", [Backbone, StockNetwork])
def test_guidance_ends_in_every_kind_of_network(network: Any) -> None:
    model = sampler()
    prompts = [model.backbone.embedding[torch.tensor(prompt)] for prompt in random_prompts(4)]
    step = one_token(model.table, lambda hidden: model.head(model.features(hidden)))
    drawer = PictureSampler(network(llama()), step, positions=TOKENS)
    half = SamplingSettings(guidance=3.0, temperature=0, guidance_until=6 / TOKENS)
    found = drawer.draw(prompts, [prompts[0]] * 4, range(4), half).long()
    whole = drawer.draw(
        prompts, [prompts[0]] * 4, range(4), replace(half, guidance_until=1.0)
    ).long()
    assert torch.equal(found[:, :6], whole[:, :6])
    for prompt, tokens in zip(random_prompts(4), found, strict=True):
        assert torch.equal(tokens[6:], follow(model, prompt, tokens))


def test_a_held_block_starts_afresh() -> None:
    model, settings = sampler(), SamplingSettings(guidance=3.0, guidance_until=0.5)
    prompts = [prompt for prompt in random_prompts(30) if len(prompt) <= 16][:8]
    expected = [model.draw(prompts[i : i + 4], range(i, i + 4), settings) for i in (0, 4)]
    held = _Block(model, 4, 32, settings)  # room for wider prompts too
    assert held.fits(4, 16, settings)
    assert not held.fits(4, 64, settings)
    for i, tokens in zip((0, 4), expected, strict=True):
        with torch.inference_mode():
            assert torch.equal(
                held.draw(prompts[i : i + 4], list(range(i, i + 4)), 16).int(), tokens
            )


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_block_and_loses_nothing(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, settings = sampler(), random_prompts(40), SamplingSettings(guidance=3.0)
    expected = model.draw(prompts, range(40), settings)
    draw, sizes = _Block.draw, []

    def hungry(self: _Block, *arguments: object) -> Tensor:
        sizes.append(self.samples)
        if self.samples > 8 and len(sizes) > 1:  # in the middle: the first block is done
            raise error
        return draw(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_Block, "draw", hungry)
    model.block = 16
    assert torch.equal(model.draw(prompts, range(40), settings), expected)
    assert model.block == 8
    assert sizes[0] == 16
    assert sizes[1] > 8
    assert max(sizes[2:]) <= 8

    def broken(self: _Block, *arguments: object) -> Tensor:
        raise error

    monkeypatch.setattr(_Block, "draw", broken)
    with pytest.raises(RuntimeError):
        model.draw(prompts, range(40), settings)
    assert model.block == 1


def test_memory_does_not_grow() -> None:
    """After a warm-up, 100 batches of changing sizes leave the process as large as it was."""
    model, prompts, settings = sampler(), random_prompts(24), SamplingSettings(guidance=3.0)
    model.tokens = 4

    def batches(count: int) -> int:
        for i in range(count):
            model.draw(prompts[: 1 + i % 24], range(1 + i % 24), settings)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before = batches(48)
    assert batches(100) < before + 8 * 2**20
