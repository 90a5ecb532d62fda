"""Plan a run: cut its prompts into shards, the unit of work and of commit.

The same input gives the same plan. Here are also the names of stages, blobs and samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from isic_ray.runs.schema import Prompt

# Stages of a run, besides one `verdict_stage` per codebook.
TOKENS, PAIRS, PROMPTS = "tokens", "pairs", "prompts"


def verdict_stage(codebook_digest: str) -> str:
    """Return the name of the stage that holds all judges' verdicts under a codebook."""
    return f"verdicts-{codebook_digest[:12]}"


def redrawn_stage(codebook_digest: str) -> str:
    """Return the name of the stage that holds the samples drawn again under a codebook.

    Only families whose tokens depend on the codebook have such stages.
    """
    return f"{TOKENS}-{codebook_digest[:12]}"


def codebook_blob(codebook_digest: str) -> str:
    """Return the name of the blob that holds an edited codebook as a `SafeCodebook`."""
    return f"codebooks/{codebook_digest}.safetensors"


@dataclass(frozen=True)
class Shard:
    """Consecutive (prompt, sample_index) cells of one role and split."""

    name: str
    role: str
    split: str
    cells: tuple[tuple[Prompt, int], ...]


def plan_shards(prompts: Sequence[Prompt], samples_per_prompt: int, shard_size: int) -> list[Shard]:
    """Cut every (role, split) into shards of at most ``shard_size`` samples.

    They are named ``ROLE-SPLIT-0000``, counting within the role and split.
    """
    ordered = sorted(prompts, key=lambda p: (p.role, p.split))  # stable: file order within a set
    shards = []
    for (role, split), group in groupby(ordered, key=lambda p: (p.role, p.split)):
        cells = [(prompt, index) for prompt in group for index in range(samples_per_prompt)]
        for number, start in enumerate(range(0, len(cells), shard_size)):
            name = f"{role}-{split}-{number:04d}"
            shards.append(Shard(name, role, split, tuple(cells[start : start + shard_size])))
    return shards


def sample_id(prompt_id: str, index: int) -> str:
    """Return the id of a prompt's sample number ``index``."""
    return f"{prompt_id}/{index}"


def sample_seed(run_seed: int, prompt_id: str, index: int) -> int:
    """Return the 63-bit seed of one sample.

    The safe rewrite of a prompt is drawn with its prompt's seed, so that their layouts align.
    """
    digest = hashlib.sha256(f"{run_seed}/{prompt_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
