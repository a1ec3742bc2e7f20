"""A model's loss and every gradient are the same with the kernels as without, and each kernel is reached."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank.kernels import cross_entropy, lora_linear, rms_norm, rope, row_norm, swiglu
from lowrank.methods.dora import DoRAConfig
from lowrank.methods.lora import LoRAConfig
from lowrank.training.losses import summed_loss

MODELS = Path(__file__).parents[1] / "fixtures" / "models"
ALL = {"rms_norm", "rope", "swiglu", "linear_cross_entropy", "linear_kl", "lora_linear", "add_low_rank"}


@pytest.mark.parametrize(
    "name, quantize, config, wanted",
    [
        ("llama", "nf4-dq", LoRAConfig(rank=4), ALL),
        ("llama", None, DoRAConfig(rank=4), (ALL | {"row_norm"}) - {"lora_linear", "add_low_rank"}),
        ("gemma2", None, LoRAConfig(rank=4), ALL - {"swiglu"}),  # softcap, w - 1 stored, GELU
        ("chatglm3", None, LoRAConfig(rank=4), ALL),  # interleaved pairs on half a head, packed projections
    ],
)
def test_loss_and_gradients_are_the_same(name, quantize, config, wanted, device, monkeypatch) -> None:
    model, _ = lowrank.load(str(MODELS / name), dtype=torch.float32, quantize=quantize, device=device)
    lowrank.attach(model, config)
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, std=0.1) if p.dim() > 1 else nn.init.uniform_(p, 0.5, 1.5)
    ids = torch.randint(5, 60, (2, 7), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}  # padding costs programs
    batch["kl_mask"] = torch.zeros_like(ids, dtype=torch.bool)
    batch["kl_mask"][0, :3], batch["labels"][0, :3] = True, -100
    batch["teacher"] = torch.randn(3, model.config.dim, device=device)
    called: set[str] = set()
    for module in (cross_entropy, lora_linear, rms_norm, rope, row_norm, swiglu):
        real = module.launches
        monkeypatch.setattr(module, "launches", lambda f, real=real, **t: real(f, **t) and (called.add(f) or True))
    results = {}
    for mode in ("ref", "triton"):
        monkeypatch.setenv("LOWRANK_KERNELS", mode)
        loss = summed_loss(model, batch)
        results[mode] = [loss, *torch.autograd.grad(loss, trained)]
    assert called == wanted
    # fp32 on both sides, the same sums in another order through a few layers: 1e-6 of the largest is 10 roundings
    for plain, kernel in zip(results["ref"], results["triton"]):
        assert (kernel - plain).abs().max() <= 1e-4 * plain.abs().max()
        assert plain.any()
