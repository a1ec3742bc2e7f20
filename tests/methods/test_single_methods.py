"""What is special to one method: its initial values, its budget, its rates, what it refuses."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from lowrank.adapter import METHODS, dense_weight, register
from lowrank.hosts import randomise
from lowrank.methods.adalora import AdaLoRAConfig
from lowrank.methods.dora import DoRA, DoRAConfig
from lowrank.methods.full import FullConfig
from lowrank.methods.ia3 import IA3Config
from lowrank.methods.loftq import LoftQ, LoftQConfig
from lowrank.methods.loha import LoHaConfig
from lowrank.methods.lokr import LoKr, LoKrConfig, split
from lowrank.methods.lora import LoRA, LoRAConfig
from lowrank.methods.oft import OFT, OFTConfig
from lowrank.methods.olora import OLoRA, OLoRAConfig
from lowrank.methods.parts import principal, shared_uniform
from lowrank.methods.pissa import PiSSA, PiSSAConfig
from lowrank.methods.vera import VeRAConfig
from lowrank.quant.linear import QuantizedLinear, quantize_model
from lowrank.training.loop import TrainConfig, fit


def net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(sizes)))


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_scaling_of_lora_and_rslora(stabilized: bool) -> None:
    adapter = LoRA(LoRAConfig(rank=4, alpha=8, rank_stabilized=stabilized), nn.Linear(8, 8))
    assert adapter.scaling == (4.0 if stabilized else 2.0)


@pytest.mark.parametrize("grad", [False, True])
def test_lora_under_autocast_is_its_forward(grad: bool) -> None:
    model, x = nn.Sequential(nn.Linear(24, 40)), torch.randn(50, 24)
    lowrank.attach(model, LoRAConfig(rank=4), ["0"])
    layer = model[0]
    randomise(layer.adapters["default"], 0)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layer.adapters["default"](x, layer.base(x), layer.base))


def test_lora_plus_trains_b_faster() -> None:
    model = net(8, 8)
    lowrank.attach(model, LoRAConfig(rank=2, lr_ratio=16), ["0"])
    groups = model[0].adapters["default"].param_groups(1e-3)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    adapter = model[0].adapters["default"]
    assert rates == {id(adapter.lora_A): 1e-3, id(adapter.lora_B): 16e-3}


def test_patterns_change_rank_and_alpha_of_single_layers() -> None:
    model = net(8, 8, 8)
    lowrank.attach(model, LoRAConfig(rank=2, alpha=4, rank_pattern={"1": 5}, alpha_pattern={"0|2": 6}), ["0", "1"])
    first, second = (layer.adapters["default"] for layer in model)
    assert len(first.lora_A) == 2 and first.scaling == 3.0
    assert len(second.lora_A) == 5 and second.scaling == pytest.approx(4 / 5)


def test_dora_starts_with_the_norms_of_the_rows_and_its_norm_is_the_dense_one() -> None:
    for base in (nn.Linear(24, 40), QuantizedLinear(quantized := _nf4(nn.Linear(64, 40)), None)):
        adapter = DoRA(DoRAConfig(rank=4), base)
        weight = dense_weight(base)
        torch.testing.assert_close(adapter.lora_magnitude_vector.detach(), weight.norm(dim=1))
        randomise(adapter, 0)
        dense = weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
        torch.testing.assert_close(adapter.norm(base), dense.norm(dim=1).detach())
    assert quantized.shape == (40, 64)


def _nf4(layer: nn.Linear):
    from lowrank.quant.tensor import QuantizedTensor

    return QuantizedTensor.quantize(layer.weight, "nf4")


def test_pissa_holds_the_largest_singular_values_and_the_base_the_rest() -> None:
    base = nn.Linear(24, 40)
    adapter = PiSSA(PiSSAConfig(rank=4, alpha=4), base)
    U, S, Vt = torch.linalg.svd(base.weight.detach())
    top = U[:, :4] * S[:4] @ Vt[:4]
    torch.testing.assert_close(adapter.scaling * (adapter.lora_B @ adapter.lora_A).detach(), top, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dense_weight(adapter.edit(base)), base.weight.detach() - top, atol=1e-5, rtol=1e-4)


def test_olora_starts_from_q_and_r_and_the_base_keeps_the_rest() -> None:
    base = nn.Linear(24, 40)
    adapter = OLoRA(OLoRAConfig(rank=4, alpha=8), base)
    Q, R = torch.linalg.qr(base.weight.detach())
    assert torch.equal(adapter.lora_A, R[:4]) and torch.equal(adapter.lora_B, Q[:, :4])
    torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, torch.eye(4))
    torch.testing.assert_close(dense_weight(adapter.edit(base)), base.weight.detach() - 2 * Q[:, :4] @ R[:4])


def test_a_randomised_svd_comes_near_the_exact_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(60, 8) @ torch.randn(8, 40) + 0.01 * torch.randn(60, 40)
    exact, fast = (torch.matmul(*reversed(principal(weight, 8, n))) for n in (0, 8))
    assert (exact - fast).norm() < 1e-3 * exact.norm()


def test_loftq_is_nearer_to_the_base_than_quantization_alone() -> None:
    base = nn.Linear(128, 96)
    weight, errors = base.weight.detach(), []
    for iterations in (1, 5):
        adapter = LoftQ(LoftQConfig(rank=16, iterations=iterations), base)
        q = adapter.quantized(weight).dequantize(torch.float32)
        errors.append(float((q + adapter.scaling * adapter.lora_B @ adapter.lora_A - weight).detach().norm()))
    plain = float((_nf4(base).dequantize(torch.float32) - weight).norm())
    assert errors[1] < errors[0] < 0.9 * plain


def test_loftq_on_a_quantized_base_says_what_it_needs() -> None:
    model = net(64, 64)
    quantize_model(model, "nf4")
    with pytest.raises(ValueError, match=r"LoftQ starts from a dense nn.Linear.*quantize=None"):
        lowrank.attach(model, LoftQConfig(), ["0"])
    assert "_lowrank" not in model.__dict__


def test_oft_is_a_rotation() -> None:
    for terms, tolerance in ((0, 1e-6), (9, 1e-5)):
        adapter = OFT(OFTConfig(block_size=8, neumann_terms=terms), nn.Linear(24, 40))
        with torch.no_grad():
            adapter.oft_R.normal_(std=0.02)  # the series needs small Q: what is cut off is 2 |Q|^8
        R = adapter.rotations()
        torch.testing.assert_close(R @ R.mT, torch.eye(8).expand(3, 8, 8), atol=tolerance, rtol=0)


def test_oft_names_the_nearest_block_size() -> None:
    with pytest.raises(ValueError, match=r"0: block_size 7 does not divide the 24 inputs; the nearest is 6"):
        lowrank.attach(net(24, 8), OFTConfig(block_size=7), ["0"])


def test_vera_draws_one_pair_for_all_layers_and_each_takes_its_corner() -> None:
    model = net(24, 40, 16)
    lowrank.attach(model, VeRAConfig(rank=8, seed=3), ["0", "1"])
    A, B = shared_uniform(3, (8, 40), (40, 8))
    for layer, (i, o) in zip(model, ((24, 40), (40, 16)), strict=True):
        adapter = layer.adapters["default"]
        assert torch.equal(adapter.vera_A, A[:, :i]) and torch.equal(adapter.vera_B, B[:o])
        assert adapter.vera_A.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
    assert not any("vera_A" in key for key in adapter.state_dict())


def test_ia3_scales_the_input_of_feed_forward_layers() -> None:
    model = nn.ModuleDict({"k_proj": nn.Linear(8, 4), "down_proj": nn.Linear(6, 4)})
    lowrank.attach(model, IA3Config(), ["k_proj", "down_proj"])
    assert model["k_proj"].adapters["default"].ia3_l.shape == (4,)
    assert model["down_proj"].adapters["default"].ia3_l.shape == (6,)


@pytest.mark.parametrize(
    "size, factor, wanted",
    [(64, -1, (8, 8)), (112, -1, (8, 14)), (13, -1, (1, 13)), (64, 4, (4, 16)), (60, 8, (6, 10)), (36, 6, (6, 6))],
)
def test_lokr_splits_as_evenly_as_it_may(size, factor, wanted) -> None:
    assert split(size, factor) == wanted


def test_lokr_can_write_both_factors_as_products() -> None:
    adapter = LoKr(LoKrConfig(rank=2, decompose_both=True), nn.Linear(64, 144))
    names = {name for name, _ in adapter.named_parameters()}
    assert names == {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}
    assert not adapter.delta().any() and adapter.delta().shape == (144, 64)


def test_loha_has_a_rank_above_its_own() -> None:
    adapter = METHODS["loha"](LoHaConfig(rank=3), nn.Linear(40, 40))
    randomise(adapter, 0)
    assert torch.linalg.matrix_rank(adapter.delta()) == 9


def test_full_pulls_back_to_the_base() -> None:
    model = net(8, 8)
    lowrank.attach(model, FullConfig(strength=0.5), ["0"])
    adapter = model[0].adapters["default"]
    assert float(adapter.penalty()) == 0
    randomise(adapter, 0)
    squares = adapter.delta_weight.square().sum() + adapter.delta_bias.square().sum()
    torch.testing.assert_close(adapter.penalty(), 0.25 * squares)
    lowrank.detach(model)
    lowrank.attach(model, FullConfig(), ["0"])
    assert model[0].adapters["default"].penalty() is None


def train_adalora(steps: int) -> nn.Sequential:
    """Two layers side by side: the first one's target is an update of rank 6, the second one has nothing to learn."""
    model = net(16, 16, 16)
    model.requires_grad_(False)
    torch.manual_seed(1)
    x = torch.randn(64, 16)
    goals = F.linear(x, model[0].weight + torch.randn(16, 6) @ torch.randn(6, 16) / 4, model[0].bias), model[1](x)
    config = AdaLoRAConfig(rank=8, target_rank=3, alpha=8, start=0.1, end=0.6, orthogonality=0.01)
    lowrank.attach(model, config, ["0", "1"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    adapters = [layer.adapters["default"] for layer in model]
    alive = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum((layer(x) - goal).square().mean() for layer, goal in zip(model, goals, strict=True))
        loss = loss + sum(adapter.penalty() for adapter in adapters)
        loss.backward()
        optimizer.step()
        for adapter in adapters:
            adapter.after_step(step, steps)
        alive.append(sum(int((a.lora_E != 0).sum()) for a in adapters))
    model.alive = alive
    return model


def test_adaloras_budget_falls_and_moves_to_the_layer_that_needs_it() -> None:
    model = train_adalora(60)
    first, second = (int((layer.adapters["default"].lora_E != 0).sum()) for layer in model)
    assert max(model.alive[:6]) == 8 and all(a >= b for a, b in pairwise(model.alive[6:]))
    assert (first, second) == (6, 0)  # the budget of 2 x 3, all of it where it helps


def test_adaloras_scores_survive_a_resume(tmp_path) -> None:
    """Half the steps, a fresh process's model, the other half: the same bytes as all of them at once."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.q_proj, self.lm_head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)

        def forward(self, ids, attention_mask=None):
            return self.lm_head(torch.tanh(self.q_proj(self.embed(ids))))

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (4, 6), generator=generator)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    config = TrainConfig(steps=12, lr=1e-2, save_every=5, batch_size=4, keep=5)
    results = []
    for name, resume in (("whole", False), ("halves", True)):
        model = Tokens()
        torch.manual_seed(1)
        lowrank.attach(model, AdaLoRAConfig(rank=6, target_rank=2), ["q_proj"])
        fit(model, batches, config, folder=tmp_path / "whole" if resume else tmp_path / name, resume=resume)
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_prepare_sees_the_batches_before_step_one() -> None:
    @dataclass(frozen=True)
    class FromDataConfig(LoRAConfig):
        pass

    seen = []

    class FromData(LoRA):
        Config = FromDataConfig

        def prepare(self, model, batches) -> None:
            seen.append(next(iter(batches))["input_ids"].shape)

    register("from data")(FromData)
    try:
        model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20))
        model.forward = lambda ids, attention_mask=None: model[1](model[0](ids))
        lowrank.attach(model, FromDataConfig(rank=2), ["1"])
        ids = torch.randint(20, (4, 6))
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
        run = fit(model, batches, TrainConfig(steps=2, batch_size=4))
        assert seen == [(4, 6)] and len(run.log) == 2
    finally:
        del METHODS["from data"]


def test_a_subclass_without_a_configuration_of_its_own_gets_one() -> None:
    @register("lora again")
    class Again(LoRA):
        def forward(self, x, y, base):
            return y + 1

    try:
        assert Again.Config is not LoRAConfig and issubclass(Again.Config, LoRAConfig)
        model = net(8, 8)
        x = torch.randn(2, 8, dtype=torch.bfloat16)
        model.bfloat16()
        y = model(x)
        coverage = lowrank.attach(model, Again.Config(rank=2), ["0"])
        assert not coverage.fused and torch.equal(model(x), y + 1)  # never the inherited fused path
        lowrank.detach(model)
        assert lowrank.attach(model, LoRAConfig(rank=2), ["0"]).fused
    finally:
        del METHODS["lora again"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AdaLoRAConfig(rank=4, target_rank=5), "target_rank must lie between 1 and rank 4"),
        (lambda: AdaLoRAConfig(start=0.9, end=0.2), "start <= end"),
        (lambda: LoRAConfig(lr_ratio=0), "lr_ratio must be positive"),
        (lambda: LoftQConfig(iterations=0), "iterations must be at least 1"),
        (lambda: LoftQConfig(format="nf5"), "nf5"),
        (lambda: OFTConfig(block_size=1), "block_size must be at least 2"),
        (lambda: OFTConfig(neumann_terms=2), "neumann_terms must be 0 or at least 3"),
        (lambda: LoHaConfig(alpha=0), "alpha must be positive"),
        (lambda: FullConfig(strength=-1), "strength must not be negative"),
        (lambda: VeRAConfig(dropout=1.0), "dropout must lie"),
        (lambda: METHODS["houlsby"].Config(activation="softmax"), "activation must be one of relu"),
        (lambda: METHODS["prompt"].Config(tokens=0), "tokens must be at least 1"),
        (lambda: METHODS["prompt"].Config(start="zero"), "start must be"),
        (lambda: METHODS["p_tuning"].Config(encoder="gru"), "encoder must be"),
        (lambda: METHODS["prefix"].Config(tokens=0), "tokens must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_errors(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
