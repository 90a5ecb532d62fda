"""A parameter and Adam's moments, read under one ZeRO stage and put back under any: training
goes on as if whole.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import os, sys, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
rendezvous = f"file://{sys.argv[1]}"
torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
from isic_ray.codebook.finetune import HarmlessDelta
from isic_ray.execution.training import gathered, initialise, read_moments, write_state

generator = torch.Generator().manual_seed(0)
edited, slopes = torch.randn(64, 8, generator=generator), torch.randn(6, 64, 8, generator=generator)

def start(stage):
    module = HarmlessDelta(edited, None)
    adam = torch.optim.Adam(module.parameters(), lr=0.01)
    return module, initialise(module, adam, batch_size=1, zero_stage=stage)

def train(engine, slopes):
    for slope in slopes:
        engine.backward((engine() * slope).sum())
        engine.step()

def delta(module):
    with gathered(module.delta):
        return module.delta.detach().clone()

module, engine = start(0)
train(engine, slopes)
whole = delta(module)
module, engine = start(0)
train(engine, slopes[:3])
half, moments = delta(module), read_moments(engine, module.delta)
for stage in range(4):
    module, engine = start(stage)
    write_state(engine, module.delta, half, moments, 3)
    train(engine, slopes[3:])
    torch.testing.assert_close(delta(module), whole, rtol=0, atol=1e-7)
    assert not torch.equal(delta(module), half)
    state = read_moments(engine, module.delta)
    assert all(tensor.shape == (64, 8) for tensor in state.values())
print("as if nothing had been")
"""


def test_training_goes_on_under_every_zero_stage(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "group")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("as if nothing had been")
