"""The learning rate's course, against expected values and by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank.training.optim import OptimConfig, make_optimizer, rate

FIXTURES = Path(__file__).parents[1] / "fixtures" / "training"
SCHEDULES = json.loads((FIXTURES / "schedules.json").read_text())["schedules"]
COSINE = [s for s in SCHEDULES if s["type"] == "cosine" and s.get("num_cycles", 0.5) == 0.5]


@pytest.mark.parametrize("case", COSINE, ids=lambda c: f"{c['num_warmup_steps']}-of-{c['num_training_steps']}")
def test_warm_up_and_cosine_match_the_reference(case) -> None:
    steps, warmup = case["num_training_steps"], case["num_warmup_steps"]
    config = OptimConfig(lr=case["base_lr"], warmup_ratio=warmup / steps)
    for step in range(steps):
        assert rate(step, steps, config) * config.lr == pytest.approx(case["values"][step], rel=1e-12, abs=1e-18)


def test_the_worked_example() -> None:
    config = OptimConfig(lr=5e-4, warmup_ratio=0.05)
    assert rate(0, 1000, config) == 0
    assert rate(30, 1000, config) * config.lr == pytest.approx(3e-4)
    assert rate(50, 1000, config) == 1
    assert 0 < rate(999, 1000, config) < 1e-5


def test_the_cosine_ends_at_its_floor() -> None:
    config = OptimConfig(min_lr_ratio=0.1, warmup_ratio=0)
    assert rate(10, 10, config) == pytest.approx(0.1)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_lr_ratio must lie in \[0, 1\], got 2"):
        OptimConfig(min_lr_ratio=2)
    with pytest.raises(ValueError, match="lr must be positive"):
        OptimConfig(lr=0)


def test_nothing_to_train_is_an_error() -> None:
    model = nn.Linear(2, 2)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(model, OptimConfig())


def test_only_what_has_a_gradient_is_in_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig())
    inside = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(inside) == 2 and all(isinstance(p, torch.Tensor) and p.requires_grad for p in inside)


def test_a_step_gives_the_bits_of_torch_s_own_fused_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4).to(torch.bfloat16))
    theirs = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4).to(torch.bfloat16))
    theirs.load_state_dict(ours.state_dict())
    settings = OptimConfig(lr=0.01, weight_decay=0.1)
    optimizer = make_optimizer(ours, settings)
    betas = (settings.beta1, settings.beta2)
    expected = torch.optim.AdamW(theirs.parameters(), 0.01, betas, settings.eps, weight_decay=0.1, fused=True)
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters())):
            a.grad = None if i == step else torch.randn_like(a)  # a parameter without a gradient stays as it is
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
        assert all(a.grad is None for a in ours.parameters())


def test_training_does_not_import_the_compiler() -> None:
    code = """
import sys, torch
import lowrank
from lowrank.methods.lora import LoRAConfig
from lowrank.training.loop import TrainConfig, fit
model, _ = lowrank.load(sys.argv[1], quantize="nf4-dq", device="cpu", progress=False)
lowrank.attach(model, LoRAConfig(rank=2))
ids = torch.ones(2, 4, dtype=torch.long)
fit(model, [{"input_ids": ids, "attention_mask": ids, "labels": ids}], TrainConfig(steps=2))
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(FIXTURES.parent / "models" / "llama")], check=True)
