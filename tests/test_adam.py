"""Adam by its functional form: the bits of torch's own optimiser."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from fedcil.keys import Key
from fedcil.methods.adam import Adam
from fedcil.models.network import snapshot


def test_it_ends_where_torchs_own_ends(small: Any) -> None:
    ours, theirs = small.generator(), small.generator()
    for generator in (ours, theirs):
        generator.requires_grad_(True).train()
    one, other = Adam(ours.parameters(), 3e-3), torch.optim.Adam(theirs.parameters(), 3e-3, fused=True)
    for step in range(5):
        latents = torch.randn(6, 5, generator=Key(step).torch())
        one.step(ours(latents).square().sin().sum())
        loss = theirs(latents).square().sin().sum()
        other.zero_grad()
        loss.backward()
        other.step()
    for name, tensor in snapshot(theirs).items():
        assert torch.equal(snapshot(ours)[name], tensor), name


def test_it_does_not_import_torchs_compiler() -> None:
    code = (
        "import sys, torch; from fedcil.methods.adam import Adam; p = torch.nn.Parameter(torch.ones(2)); "
        "Adam([p], 0.1).step(p.square().sum()); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
