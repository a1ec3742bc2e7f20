"""What `lowrank plan` says, from configurations alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank.cli import main
from lowrank.errors import ConfigError
from lowrank.methods.lora import LoRAConfig
from lowrank.models.load import load
from lowrank.models.plan import (
    BUILT_IN,
    WAYS,
    Aim,
    Load,
    Way,
    _Live,
    adapted,
    advice,
    memory,
    parse_size,
    read_model,
    stored,
    traced,
)
from lowrank.targets import attach

LLAMA = Path(__file__).parent.parent / "fixtures" / "models" / "llama"
LORA, QLORA, FULL = WAYS[2], WAYS[4], WAYS[0]


def test_lora_on_chatglm3_trains_1_949_696() -> None:
    _, trainable, total = adapted(read_model("chatglm3-6b"), LORA, Load(targets=("query_key_value",)))
    assert (trainable, total) == (1_949_696, 6_245_533_696)


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "smollm2-135m": 134_515_008, "bert-base": 108_898_569, "qwen2-1.5b": 1_543_714_304,
        "chatglm3-6b": 6_243_584_000, "llama-7b": 6_738_415_616, "llama-8b": 8_030_261_248,
        "llama-70b": 70_553_706_496, "qwen-72b": 72_706_203_648,
    }.items(),
)  # fmt: skip
def test_the_built_in_models_have_their_published_sizes(name: str, parameters: int) -> None:
    assert adapted(read_model(name), WAYS[6], Load())[2] == parameters and set(BUILT_IN) >= {name}


@pytest.mark.parametrize("quantize", [None, "nf4-dq"])
def test_weights_take_what_a_loaded_model_takes(quantize: str | None) -> None:
    model, _ = load(LLAMA, quantize=quantize, device="cpu", progress=False)
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    from lowrank.models.load import skeleton

    assert stored(skeleton(read_model(str(LLAMA))), quantize is not None) == sum(held.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", [64, 256])  # two ways of attention
def test_the_trace_is_what_real_tensors_take_and_grows_by_layers(checkpointing: bool, length: int) -> None:
    config, way, asked = read_model(str(LLAMA)), Way("", "lora", False, checkpointing), Load(2, length, rank=4)
    model, _ = load(LLAMA, device="cpu", progress=False)
    attach(model, LoRAConfig(rank=4))
    model.train().checkpointing = checkpointing
    live, ids = _Live(), torch.zeros(2, length, dtype=torch.long)
    with live:
        hidden = model.hidden(ids)
        held = live.now
        hidden.backward(torch.empty_like(hidden))
    assert (held, held, live.most) == traced(config, config.n_layers, way, asked)
    _, on_cpu, most = traced(config, config.n_layers, way, replace(asked, cpu=True))
    assert on_cpu >= held and most >= live.most  # with the gaps between
    two, three, five = (traced(replace(config, windows=(None,) * n), n, way, asked)[0] for n in (2, 3, 5))
    assert five - three == 2 * (three - two)


def test_checkpointing_four_bits_and_devices_each_save_memory() -> None:
    config = read_model("qwen2-1.5b")
    plain, saved = memory(config, LORA, Load()), memory(config, WAYS[3], Load())
    assert saved.activations < plain.activations / 8 and saved.peak < plain.peak
    assert memory(config, QLORA, Load()).weights < plain.weights / 2
    four = memory(config, FULL, Load(devices=4))
    whole = memory(config, FULL, Load())
    assert four.optimizer == whole.optimizer // 4 and whole.peak / 4 < four.peak < whole.peak / 2
    longer = memory(config, LORA, Load(length=2048))
    assert longer.activations == pytest.approx(2 * plain.activations, rel=0.02)


PEAKS = {"full": 100e9, "full, checkpointed": 90e9, "LoRA": 20e9, "LoRA, checkpointed": 16e9, "QLoRA": 9e9,
         "QLoRA, checkpointed": 6e9}  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "aim", "said"),
    [
        (200e9, Aim(60_000), "Full fine-tuning (full)"),
        (95e9, Aim(60_000), "r = 16 to 32"),
        (99e9, Aim(50_000, general=True), "LoRA, r = 4 to 8, with a regulariser"),
        (18e9, Aim(1_000, general=True), "LoRA, checkpointed, r = 4 to 8"),
        (10e9, Aim(1_000, general=True), "QLoRA, r = 4 to 8"),
        (24e9, Aim(1_000), "QLoRA with augmentation"),
        (24e9, Aim(1_000, light=True), "Prefix tuning"),
        (24e9, Aim(1_000, domains=3), "One adapter for each of the 3 domains"),
        (5e9, Aim(), "It does not train in 5 GB"),
    ],
)
def test_the_recommendation_follows_its_rules(limit: float, aim: Aim, said: str) -> None:
    assert any(said in line for line in advice(PEAKS, limit, aim))


def test_a_70b_model_is_told_not_to_train_in_24_gb(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "llama-70b", "--memory", "24GB", "--length", "256"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "It does not train in 24 GB" in text and "39.5 GB in double-quantized NF4" in text and "devices" in text


def test_an_encoder_is_planned_at_the_length_it_takes(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "bert-base", "--cpu", "--memory", "8GB"]) == 0
    assert "1 x 512 tokens" in capsys.readouterr().out
    assert main(["plan", "bert-base", "--length", "513"]) == 2 and "512 positions" in capsys.readouterr().err


def test_sizes_and_names_that_are_none(tmp_path: Path) -> None:
    assert [parse_size(s) for s in ("24GB", "24", "512mb", "16 GiB")] == [24e9, 24e9, 512e6, 16 * 2**30]
    for bad in ("", "GB", "-3GB", "0", "24 parsecs"):
        with pytest.raises(ConfigError, match="memory size"):
            parse_size(bad)
    with pytest.raises(ConfigError, match="did you mean 'bert-base'"):
        read_model("bert-bas")
    with pytest.raises(FileNotFoundError):
        read_model(str(tmp_path))
    assert main(["plan", "bert-base", "--batch", "0"]) == 2
