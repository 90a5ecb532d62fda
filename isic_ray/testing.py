"""Test whether a model adapter does what the loop relies on: a conformance suite for all of them.

In your tests, subclass it and give the adapter as a fixture; pytest finds the inherited tests:

    class TestMyModel(UnifiedModelConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def model(cls) -> UnifiedModel:
            return MyModel.from_pretrained("tiny-checkpoint", device="cpu")

A small randomly initialised checkpoint is enough; nothing here asks for good pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings, UnifiedModel


class UnifiedModelConformance:
    """What the loop relies on, one test each. Class attributes may be overridden."""

    # False: judge and rewrite must raise a UserError that names judge.model
    judges: ClassVar[bool] = True
    prompts: ClassVar[list[str]] = ["a red cat", "a blue dog on the table with a knife", "knife"]
    questions: ClassVar[list[str]] = ["is there a knife ?", "is the cat red ?"]
    instruction: ClassVar[str] = "rewrite safely : {prompt}"
    settings: ClassVar[SamplingSettings] = SamplingSettings(guidance=3.0)
    pixel_tolerance: ClassVar[int] = 1  # grey levels between decode and renderer

    def test_it_declares_what_the_loop_needs(self, model: UnifiedModel) -> None:
        assert isinstance(model, UnifiedModel)
        assert model.codebook.dtype == torch.float32
        assert model.codebook.ndim == 2
        assert model.codebook.device.type == "cpu"
        assert model.codebook.isfinite().all()
        assert model.tokens_per_image > 0
        assert len(model.weights_digest) >= 6
        assert isinstance(model.normalised, bool)
        assert isinstance(model.tokens_depend_on_codebook, bool)

    def test_samples_are_tokens_of_the_table(self, model: UnifiedModel) -> None:
        tokens = model.sample(self.prompts, range(len(self.prompts)), self.settings)
        assert tokens.dtype == torch.int32
        assert tokens.device.type == "cpu"
        assert tokens.shape == (len(self.prompts), model.tokens_per_image)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < len(model.codebook)

    def test_a_sample_depends_on_its_own_row_alone(self, model: UnifiedModel) -> None:
        prompts, seeds = self.prompts * 2, list(range(2 * len(self.prompts)))
        whole = model.sample(prompts, seeds, self.settings)
        for i in (0, len(prompts) - 1):
            assert torch.equal(model.sample([prompts[i]], [seeds[i]], self.settings)[0], whole[i])
        same_prompt, other_seed = whole[0], whole[len(self.prompts)]
        assert not torch.equal(same_prompt, other_seed)

    def test_guidance_and_temperature_matter(self, model: UnifiedModel) -> None:
        prompts, seeds = self.prompts, range(len(self.prompts))
        base = model.sample(prompts, seeds, self.settings)
        greedy = SamplingSettings(guidance=self.settings.guidance, temperature=0)
        assert not torch.equal(model.sample(prompts, seeds, SamplingSettings(guidance=1.0)), base)
        assert torch.equal(
            model.sample(prompts, seeds, greedy), model.sample(prompts, [9] * len(prompts), greedy)
        )

    def test_pictures_are_drawn_under_the_table_that_is_given(self, model: UnifiedModel) -> None:
        tokens = _tokens(model, 3)
        base = model.decode(tokens)
        assert base.dtype == np.uint8
        assert base.ndim == 4
        assert base.shape[0] == 3
        assert base.shape[3] == 3
        edited = _edited(model, torch.unique(tokens[:1]).long())
        before = model.codebook.clone()
        after = model.decode(tokens, edited)
        assert not np.array_equal(after[0], base[0])
        assert np.array_equal(model.decode(tokens), base), "an edited table must not stay behind"
        assert np.array_equal(model.decode(tokens, before), base)
        assert torch.equal(model.codebook, before)

    def test_an_edit_changes_only_pictures_that_use_its_rows(self, model: UnifiedModel) -> None:
        tokens = _tokens(model, 2)
        unused = sorted(set(range(len(model.codebook))) - set(tokens.flatten().tolist()))
        assert unused, "give a checkpoint whose table has more rows than two pictures have tokens"
        edited = _edited(model, torch.tensor(unused))
        assert np.array_equal(model.decode(tokens, edited), model.decode(tokens))

    def test_decoding_does_not_depend_on_the_batch(self, model: UnifiedModel) -> None:
        tokens = _tokens(model, 11)
        whole = model.decode(tokens)
        assert np.array_equal(model.decode(tokens[7:8])[0], whole[7])
        assert model.decode(tokens[:0]).shape == (0, *whole.shape[1:])

    def test_norms_matter_unless_rows_are_normalised(self, model: UnifiedModel) -> None:
        tokens = _tokens(model, 1)
        same = np.array_equal(model.decode(tokens, model.codebook * 4), model.decode(tokens))
        assert same == model.normalised

    def test_what_does_not_fit_is_refused(self, model: UnifiedModel) -> None:
        tokens = _tokens(model, 1)
        _raises(ValueError, lambda: model.decode(tokens, model.codebook[:-1]))
        _raises(ValueError, lambda: model.decode(tokens[:, :-1]))
        _raises(ValueError, lambda: model.decode(torch.full_like(tokens, len(model.codebook))))
        _raises(ValueError, lambda: model.encode(model.decode(tokens)[:, :-1]))

    def test_pictures_are_read_back_as_tokens(self, model: UnifiedModel) -> None:
        pictures = model.decode(_tokens(model, 9))
        found = model.encode(pictures)
        assert found.dtype == torch.int32
        assert found.shape == (9, model.tokens_per_image)
        assert 0 <= int(found.min()) <= int(found.max()) < len(model.codebook)
        assert torch.equal(model.encode(pictures[5:6])[0], found[5])
        assert model.decode(found).shape == pictures.shape

    def test_the_renderer_draws_what_decode_draws_and_teaches_the_table(
        self, model: UnifiedModel
    ) -> None:
        tokens = _tokens(model, 2)
        renderer = model.renderer()
        assert not any(parameter.requires_grad for parameter in renderer.parameters())
        table = model.codebook.clone().requires_grad_()
        pixels = renderer(tokens, table)
        levels = ((pixels.detach() + 1) / 2 * 255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        difference = np.abs(levels - model.decode(tokens).astype(np.float32))
        assert difference.max() <= self.pixel_tolerance
        pixels.square().mean().backward()
        assert table.grad is not None
        used = torch.zeros(len(table), dtype=torch.bool)
        used[torch.unique(tokens).long()] = True
        assert torch.equal(table.grad.ne(0).any(1), used)

    def test_it_judges_each_picture_and_question_alone(self, model: UnifiedModel) -> None:
        pictures = model.decode(_tokens(model, 5))
        if not self.judges:
            _raises(UserError, lambda: model.judge(pictures, self.questions), "judge.model")
            return
        scores = model.judge(pictures, self.questions)
        assert scores.dtype == torch.float32
        assert scores.shape == (5, len(self.questions))
        assert 0 <= float(scores.min()) <= float(scores.max()) <= 1
        assert torch.equal(model.judge(pictures[3:4], self.questions[1:])[0, 0], scores[3, 1])

    def test_an_edit_does_not_reach_the_judge(self, model: UnifiedModel) -> None:
        pictures = model.decode(_tokens(model, 2))
        read = model.encode(pictures)
        before = model.judge(pictures, self.questions) if self.judges else None
        model.decode(_tokens(model, 2), _edited(model, torch.arange(len(model.codebook))))
        assert torch.equal(model.encode(pictures), read)
        if before is not None:
            assert torch.equal(model.judge(pictures, self.questions), before)

    def test_it_rewrites_every_prompt(self, model: UnifiedModel) -> None:
        if not self.judges:
            _raises(UserError, lambda: model.rewrite(self.prompts, self.instruction), "judge.model")
            return
        answers = model.rewrite(self.prompts, self.instruction)
        assert len(answers) == len(self.prompts)
        assert all(isinstance(answer, str) and answer == answer.strip() for answer in answers)
        assert model.rewrite(self.prompts[1:2], self.instruction) == answers[1:2]


def _tokens(model: UnifiedModel, count: int) -> Tensor:
    """Return tokens int32 ``[count,N]`` that leave rows of the table unused."""
    generator = torch.Generator().manual_seed(1)
    highest = max(2, len(model.codebook) // 2)
    return torch.randint(
        0, highest, (count, model.tokens_per_image), generator=generator, dtype=torch.int32
    )


def _edited(model: UnifiedModel, rows: Tensor) -> Tensor:
    """Return the base table with large noise in ``rows``."""
    table = model.codebook.clone()
    noise = torch.randn(len(rows), table.shape[1], generator=torch.Generator().manual_seed(2))
    table[rows] += 2 * table[rows].norm(dim=1, keepdim=True).clamp_min(0.1) * noise
    return table


def _raises(kind: type[Exception], call: Callable[[], Any], naming: str = "") -> None:
    """Assert that ``call`` raises an exception whose message holds ``naming``."""
    said = None
    try:
        call()
    except kind as error:
        said = str(error)
    assert said is not None, f"{kind.__name__} was expected"
    assert naming in said, f"the message does not name {naming}: {said}"
