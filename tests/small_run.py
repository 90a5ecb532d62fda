"""The settings of one small real run: real Ray Data, Ray Train, DeepSpeed and the embedded
model.
"""

from __future__ import annotations

from isic_ray.config.run import (
    EditConfig,
    ExecutionConfig,
    FinetuneConfig,
    LoopConfig,
    PromptsConfig,
    RunConfig,
)

SMALL = RunConfig(
    prompts=PromptsConfig(limit=40),
    edit=EditConfig(min_count=2),
    finetune=FinetuneConfig(steps=24, batch_size=10, learning_rate=0.06),
    loop=LoopConfig(max_rounds=2, max_benign_loss=0.2, backoff=0, arms=["random"]),
    execution=ExecutionConfig(address="local", shard_size=16, batch_size=16),
)
