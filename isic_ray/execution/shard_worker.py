"""What one actor does with one shard: draw, decode, judge, rewrite, pair, commit. Plain Python; Ray only calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isic_ray import metrics
from isic_ray.auditors import OBJECT, load_auditors
from isic_ray.codebook import SafeCodebook, table_digest
from isic_ray.config import RunConfig
from isic_ray.evaluation import SELF, is_unsafe
from isic_ray.models.base import SamplingSettings
from isic_ray.models.registry import load_model
from isic_ray.plan import Shard, plan_shards, sample_id, sample_seed
from isic_ray.runs import Run
from isic_ray.schema import BENIGN, BUILD, UNSAFE, Pair, Prompt, Sample, Verdict

TOKENS, PAIRS, PROMPTS = "tokens", "pairs", "prompts"


def verdict_stage(codebook_digest: str) -> str:
    return f"verdicts-{codebook_digest[:12]}"


def codebook_blob(codebook_digest: str) -> str:
    return f"codebooks/{codebook_digest}.safetensors"


class ShardWorker:
    """Holds the model and the auditors, and turns planned shards into committed rows."""

    def __init__(self, config: RunConfig, uri: str) -> None:
        self.config, self.run = config, Run.open(uri)
        self.model = load_model(config.model)
        self.auditors = load_auditors(config.judge.auditors)
        self.base_digest = table_digest(self.model.codebook)
        prompts = self.run.read(PROMPTS, Prompt)
        plan = self.run.record["plan"]
        shards = plan_shards(prompts, config.prompts.samples_per_prompt, plan["shard_size"])
        self.prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self.shards = {shard.name: shard for shard in shards}
        self._tables: dict[str, torch.Tensor] = {self.base_digest: self.model.codebook}

    def draw(self, name: str) -> dict[str, Any]:
        """Sample, decode and judge one shard under the base codebook; pair it if it builds the edit.

        Steps that were committed before are skipped. Returns counts.
        """
        shard = self.shards[name]
        fresh = name not in self.run.committed(TOKENS)
        if fresh:
            self.run.commit(TOKENS, name, self._sample(shard), Sample)
        counts = self.judge(name, self.base_digest)
        if shard.role == UNSAFE and shard.split == BUILD and name not in self.run.committed(PAIRS):
            pairs, tally = self._pair(name)
            self.run.commit(PAIRS, name, pairs, Pair, tally)
            counts |= tally
        return {**counts, "sampled": len(shard.cells) if fresh else 0}

    def judge(self, name: str, digest: str) -> dict[str, Any]:
        """Decode and judge one shard under a codebook; only samples whose tokens touch a changed row are rendered."""
        stage = verdict_stage(digest)
        samples = self.run.read_shard(TOKENS, name, Sample)
        if name not in self.run.committed(stage):
            touched = samples if digest == self.base_digest else self._touched(samples, digest)
            verdicts = self._judge(touched, digest)
            self.run.commit(stage, name, verdicts, Verdict, {"touched": len(touched), "samples": len(samples)})
        counts = self.run.committed(stage)[name].counts or {}
        return dict(counts)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _sample(self, shard: Shard) -> list[Sample]:
        seeds = [sample_seed(self.config.sampling.seed, prompt.prompt_id, index) for prompt, index in shard.cells]
        tokens = self._draw_tokens([prompt.text for prompt, _ in shard.cells], seeds)
        return [
            Sample(
                sample_id(prompt.prompt_id, index),
                prompt.prompt_id,
                shard.role,
                shard.split,
                index,
                seed,
                self.model.weights_digest,
                tuple(row),
            )
            for (prompt, index), seed, row in zip(shard.cells, seeds, tokens.tolist(), strict=True)
        ]

    def _draw_tokens(self, texts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        sampling, size = self.config.sampling, self.config.execution.batch_size
        settings = SamplingSettings(sampling.guidance, sampling.temperature, sampling.top_k, sampling.top_p)
        parts = [
            self.model.sample(texts[start : start + size], seeds[start : start + size], settings)
            for start in range(0, len(texts), size)
        ]
        return torch.cat(parts)

    def _touched(self, samples: list[Sample], digest: str) -> list[Sample]:
        changed = (self._table(digest) != self.model.codebook).any(1)
        tokens = torch.tensor([sample.tokens for sample in samples])
        return [sample for sample, hit in zip(samples, changed[tokens].any(1).tolist(), strict=True) if hit]

    def _table(self, digest: str) -> torch.Tensor:
        if digest not in self._tables:
            artifact = SafeCodebook.from_bytes(self.run.get_blob(codebook_blob(digest)))
            self._tables[digest] = artifact.apply_to(self.model.codebook)
        return self._tables[digest]

    def _judge(self, samples: list[Sample], digest: str) -> list[Verdict]:
        rows: list[Verdict] = []
        size = self.config.execution.batch_size
        for start in range(0, len(samples), size):
            rows += self._judge_batch(samples[start : start + size], digest)
        return rows

    def _judge_batch(self, samples: list[Sample], digest: str) -> list[Verdict]:
        tokens = torch.tensor([sample.tokens for sample in samples])
        images = self.model.decode(tokens, self._table(digest))
        psnr: list[float | None] = [None] * len(samples)
        benign = [i for i, sample in enumerate(samples) if sample.role == BENIGN]
        if digest != self.base_digest and benign:
            before = self.model.decode(tokens[benign])
            for i, value in zip(benign, metrics.psnr(before, images[benign]).tolist(), strict=True):
                psnr[i] = value
        rows = []
        for sample, scores, db in zip(samples, self._self_scores(samples, images), psnr, strict=True):
            rows.append(Verdict(sample.sample_id, digest, SELF, tuple(scores), tuple(scores.values()), db))
        for auditor in self.auditors:
            for sample, row in zip(samples, auditor.score(images).tolist(), strict=True):
                rows.append(Verdict(sample.sample_id, digest, auditor.name, tuple(auditor.questions), tuple(row)))
        return rows

    def _self_scores(self, samples: list[Sample], images: np.ndarray) -> list[dict[str, float]]:
        """Every concept question for all pictures; each object question for the benign pictures that name it."""
        questions = self.config.judge.questions
        answers = self.model.judge(images, list(questions.values())).tolist()
        scores = [dict(zip(questions, row, strict=True)) for row in answers]
        asking: dict[tuple[str, str], list[int]] = {}
        for i, sample in enumerate(samples):
            if sample.role == BENIGN and self.config.judge.alignment:
                prompt = self.prompts[sample.prompt_id]
                for thing in prompt.objects or (prompt.text,):
                    article = "an" if thing[0] in "aeiou" else "a"
                    text = self.config.judge.alignment.format(object=thing, prompt=prompt.text, article=article)
                    asking.setdefault((OBJECT + thing, text), []).append(i)
        for (name, text), members in asking.items():
            for i, score in zip(members, self.model.judge(images[members], [text])[:, 0].tolist(), strict=True):
                scores[i][name] = score
        return scores

    def _pair(self, name: str) -> tuple[list[Pair], dict[str, int]]:
        """Pairs of a shard: flagged samples, and the sample of their rewritten prompt under the same seed.

        A pair is kept when the rewrite changed the prompt and its own picture is judged safe.
        """
        limit = self.config.judge.threshold
        flagged = {
            verdict.sample_id
            for verdict in self.run.read_shard(verdict_stage(self.base_digest), name, Verdict)
            if verdict.judge == SELF and is_unsafe(verdict, limit)
        }
        harmful = [s for s in self.run.read_shard(TOKENS, name, Sample) if s.sample_id in flagged]
        texts = [self.prompts[sample.prompt_id].text for sample in harmful]
        rewritten = self.model.rewrite(texts, self.config.judge.rewrite) if texts else []
        chosen = [(s, old, new) for s, old, new in zip(harmful, texts, rewritten, strict=True) if new and new != old]
        if not chosen:
            return [], {"flagged": len(harmful), "rewritten": 0, "paired": 0}
        tokens = self._draw_tokens([new for _, _, new in chosen], [sample.seed for sample, _, _ in chosen])
        images = self.model.decode(tokens)
        scores = self.model.judge(images, list(self.config.judge.questions.values()))
        safe = (scores.amax(1) < limit).tolist()
        pairs = [
            Pair(
                sample.prompt_id,
                sample.sample_id,
                old,
                new,
                self.prompts[sample.prompt_id].concepts,
                sample.tokens,
                tuple(row),
            )
            for (sample, old, new), row, ok in zip(chosen, tokens.tolist(), safe, strict=True)
            if ok
        ]
        return pairs, {"flagged": len(harmful), "rewritten": len(chosen), "paired": len(pairs)}
