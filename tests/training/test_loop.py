"""The loop against trusted trajectories, and its promises: any split, any padding, any interruption, one result."""

import json
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from lowrank.adapter import adapted_layers
from lowrank.files import read_tensors
from lowrank.filling import adapter_state
from lowrank.methods.lora import LoRAConfig
from lowrank.models.load import load
from lowrank.quant.linear import quantize_model
from lowrank.targets import attach
from lowrank.training.loop import TrainConfig, fit
from lowrank.training.losses import mean_loss, summed_loss, targets_in
from lowrank.training.optim import AdamW

FIXTURES = Path(__file__).parents[1] / "fixtures"


def tiny(quantize: str | None = None) -> nn.Module:
    model, _ = load(FIXTURES / "models" / "llama", dtype=torch.float32, progress=False)
    if quantize:
        quantize_model(model, quantize)
    return model


def case(name: str) -> tuple[dict, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    folder = FIXTURES / "training" / name
    meta = json.loads((folder / "meta.json").read_text())
    tensors = {key: value.long() for key, value in read_tensors(folder / "batches.safetensors").items()}
    count = len({key.split(".")[1] for key in tensors})
    keys = ("input_ids", "attention_mask", "labels")
    micro = [{key: tensors[f"batch.{i}.{key}"] for key in keys} for i in range(count)]
    accum = meta["spec"].get("accum", 1)
    batches = [
        {key: torch.cat([micro[(s * accum + j) % count][key] for j in range(accum)]) for key in keys}
        for s in range(meta["spec"]["steps"])
    ]
    return meta, batches, read_tensors(folder / "lora_init.safetensors")


def start(model: nn.Module, meta: dict, init: dict[str, torch.Tensor]) -> None:
    lora = meta["spec"]["lora"]
    attach(model, LoRAConfig(rank=lora["r"], alpha=lora["lora_alpha"]), lora["target_modules"])
    own = adapter_state(model, "default")
    assert {f"{key}.weight" for key in own} == set(init)
    for key, tensor in own.items():
        tensor.copy_(init[f"{key}.weight"])


def settings(meta: dict, **more: object) -> TrainConfig:
    spec = meta["spec"]
    return TrainConfig(
        steps=spec["steps"], lr=spec["lr"], weight_decay=spec["wd"], clip=spec["clip"], beta2=0.999,
        warmup_ratio=spec["warmup"] / spec["steps"], micro_batch_size=spec["B"], save_every=0, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["lora_fp32", "lora_accum4", "qlora_nf4"])
def test_the_trajectory_is_the_reference_s(name: str) -> None:
    meta, batches, init = case(name)
    model = tiny("nf4-dq" if meta["spec"].get("nf4") else None)
    start(model, meta, init)
    run = fit(model, batches, settings(meta))
    tolerance = 20 * meta["max_loss_diff_32_64"]  # what fp32 itself costs here, from the same run in fp64
    for mine, theirs in zip(run.log, meta["log"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
        assert mine["lr"] == pytest.approx(theirs["lr_used"], rel=1e-12)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm_before_clip"], rel=1e-5)


def test_final_weights_are_the_reference_s() -> None:
    meta, batches, init = case("lora_fp32")
    model = tiny()
    start(model, meta, init)
    fit(model, batches, settings(meta))
    final = read_tensors(FIXTURES / "training" / "lora_fp32" / "final_weights.safetensors")
    for key, tensor in adapter_state(model, "default").items():
        tolerance = 20 * meta["max_final_weight_diff_32_64"]
        torch.testing.assert_close(tensor, final[f"{key}.weight"], atol=tolerance, rtol=0)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def fresh(quantize: str | None = None) -> nn.Module:
    torch.manual_seed(1)
    model = tiny(quantize)
    attach(model, LoRAConfig(rank=4, alpha=8))
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.adapters["default"].lora_B, std=0.1)  # B = 0 would give A no gradient
    return model


def one_step_gradient(batch: dict[str, torch.Tensor], **changes: object) -> list[torch.Tensor]:
    model = fresh()
    captured: list[torch.Tensor] = []
    first = next(p for p in model.parameters() if p.requires_grad)
    with mock.patch.object(AdamW, "step", lambda self: captured.extend(gradients(model))):
        fit(model, [batch], TrainConfig(steps=1, clip=0, save_every=0, **changes))  # type: ignore[arg-type]
    assert first is not None and captured
    return captured


def norm_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    size = torch.cat([t.flatten() for t in a]).norm()
    return float(torch.cat([(x - y).flatten() for x, y in zip(a, b)]).norm() / size)


def test_the_gradient_does_not_depend_on_the_split_or_on_checkpointing() -> None:
    _, batches, _ = case("lora_accum4")
    whole = one_step_gradient(batches[0])
    for changes in ({"micro_batch_size": 1}, {"micro_batch_size": 3}, {"checkpointing": True}):
        # 20 x the difference of this gradient in fp32 and fp64, which is near 1e-7 for this small model
        assert norm_difference(whole, one_step_gradient(batches[0], **changes)) < 2e-6, changes


def test_the_gradient_does_not_depend_on_padding() -> None:
    _, batches, _ = case("lora_accum4")
    batch = batches[0]
    fill = {"labels": -100}
    wider = {key: nn.functional.pad(value, (0, 7), value=fill.get(key, 0)) for key, value in batch.items()}
    assert norm_difference(one_step_gradient(batch), one_step_gradient(wider)) < 2e-6


def test_padding_on_the_left_gives_the_same_gradient() -> None:
    _, batches, _ = case("lora_accum4")
    batch = batches[0]
    left = {key: torch.zeros_like(value) for key, value in batch.items()}
    left["labels"].fill_(-100)
    width = batch["input_ids"].shape[1]
    for row, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        for key, value in batch.items():
            left[key][row, width - n :] = value[row, :n]
    assert norm_difference(one_step_gradient(batch), one_step_gradient(left)) < 2e-6


def test_padding_on_the_left_gives_the_same_loss_where_positions_are_learned() -> None:
    model, _ = load(FIXTURES / "models" / "gpt2", dtype=torch.float32, progress=False)
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    left = {k: nn.functional.pad(v, (4, 0), value=-100 if k == "labels" else 0) for k, v in plain.items()}
    left["labels"][:, 4] = -100  # the first token has nothing before it to be predicted from
    assert mean_loss(model, [left]) == pytest.approx(mean_loss(model, [plain]), rel=1e-5)


def test_a_row_without_real_tokens_changes_nothing() -> None:
    _, batches, _ = case("lora_fp32")
    batch = batches[0]
    more = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in batch.items()}
    more["labels"][-1] = -100
    changed = one_step_gradient(more)
    assert all(torch.isfinite(g).all() for g in changed)
    assert norm_difference(one_step_gradient(batch), changed) < 2e-6


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path) -> None:
    meta, batches, init = case("lora_fp32")
    values = vars(settings(meta)) | {"steps": 12, "save_every": 4, "eval_every": 5, "keep_best": True}
    config = TrainConfig(**values)
    validation = [batches[2]]

    def model_at_start() -> nn.Module:
        torch.manual_seed(3)
        model = tiny()
        start(model, meta, init)
        for _, layer in adapted_layers(model):
            layer.adapters["default"].dropout = 0.2  # the random state is part of the promise
        return model

    torch.manual_seed(7)
    straight = model_at_start()
    torch.manual_seed(7)
    fit(straight, batches[:3], config, validation=validation, folder=tmp_path / "a")

    class Killed(Exception):
        pass

    def kill(row: dict) -> None:
        if row["step"] == 9:
            raise Killed

    broken = model_at_start()
    torch.manual_seed(7)
    with pytest.raises(Killed):
        fit(broken, batches[:3], config, validation=validation, folder=tmp_path / "b", on_step=kill)
    torch.manual_seed(99)  # whatever the new process starts from
    again = model_at_start()
    run = fit(again, batches[:3], config, validation=validation, folder=tmp_path / "b", resume=True)
    assert run.log[0]["step"] == 8  # went on behind the checkpoint, not from the start
    for key, tensor in adapter_state(straight, "default").items():
        assert torch.equal(tensor, adapter_state(again, "default")[key]), key
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()


def test_ctrl_c_saves_a_state_and_stops(tmp_path) -> None:
    meta, batches, init = case("lora_fp32")
    model = tiny()
    start(model, meta, init)
    run = fit(
        model, batches, settings(meta), folder=tmp_path,
        on_step=lambda row: os.kill(os.getpid(), signal.SIGINT) if row["step"] == 3 else None,
    )  # fmt: skip
    assert run.interrupted and run.metrics["steps"] == 4
    assert (tmp_path / "checkpoints" / "step-4" / "state.json").is_file()


def test_early_stopping_keeps_the_best(tmp_path) -> None:
    meta, batches, init = case("lora_fp32")
    model = tiny()
    start(model, meta, init)
    wild = {"lr": 0.5, "warmup_ratio": 0.0, "clip": 0.0}
    values = vars(settings(meta)) | wild | {"eval_every": 1, "patience": 2, "keep_best": True}
    run = fit(model, batches, TrainConfig(**values), validation=[batches[1]], folder=tmp_path)
    assert run.metrics["steps"] < meta["spec"]["steps"]
    assert mean_loss(model, [batches[1]]) == pytest.approx(run.metrics["best_eval_loss"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    meta, batches, init = case("lora_fp32")
    model = tiny()
    start(model, meta, init)
    for _, layer in adapted_layers(model):
        layer.adapters["default"].lora_B.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"step 0: loss .*not finite; lower train.lr"):
        fit(model, batches, settings(meta))


def test_all_labels_masked_is_an_error() -> None:
    meta, batches, init = case("lora_fp32")
    model = tiny()
    start(model, meta, init)
    masked = batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(ValueError, match="all labels of this batch are masked"):
        fit(model, [masked], settings(meta))


def test_kl_to_the_model_s_own_states_is_zero_and_is_split_like_the_rest() -> None:
    _, batches, _ = case("lora_accum4")
    batch = batches[0]
    model = fresh()
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        teacher = model.hidden(batch["input_ids"], attention_mask=mask)[mask]
    unlabelled = torch.full_like(batch["labels"], -100)
    held = batch | {"labels": unlabelled, "attention_mask": mask, "kl_mask": mask, "teacher": teacher}
    assert abs(float(summed_loss(model, held).detach())) < 1e-3  # two fp32 forwards of one function
    assert targets_in(held) == int(mask[:, 1:].sum())
    torch.manual_seed(0)
    other = held | {"teacher": teacher + 0.3 * torch.randn_like(teacher)}
    assert norm_difference(one_step_gradient(other), one_step_gradient(other, micro_batch_size=3)) < 2e-6


def test_a_foreign_model_trains_through_its_logits() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(256, 8), nn.Linear(8, 256)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(input_ids))

    _, batches, _ = case("lora_fp32")
    model = Foreign()
    attach(model, LoRAConfig(rank=4, alpha=8), ["out"])
    run = fit(model, [batches[0]], TrainConfig(steps=20, lr=0.05, save_every=0))
    assert run.log[-1]["loss"] < run.log[0]["loss"] - 0.3
