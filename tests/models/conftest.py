"""The quickstart's model, where it is cached or can be fetched; tiny checkpoints of every architecture."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank.adapter import adapted_layers
from lowrank.methods.lora import LoRAConfig
from lowrank.models.fetch import quickstart
from lowrank.models.load import load

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    try:
        return quickstart(progress=False)
    except RuntimeError as error:
        pytest.skip(f"the quickstart's model is neither cached nor to be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path):
    """SmolLM2 in fp32 and its tokenizer."""
    return load(smollm2_file, dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture
def copied(tmp_path: Path):
    """A function: a model folder of the fixtures, copied so that a test may damage it."""

    def copy(name: str, config: str = "config.json") -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in (FIXTURES / "models" / name).glob("model*"):
            shutil.copyfile(file, target / file.name)
        shutil.copyfile(FIXTURES / "models" / name / config, target / "config.json")
        return target

    return copy


@pytest.fixture
def sayable(copied):
    """A function: a copied model whose settings are those that llama.cpp assumes of its family."""

    def copy(name: str) -> Path:
        folder = copied(name)
        raw = json.loads((folder / "config.json").read_text())
        changes = {"sliding_window_pattern": 6, "query_pre_attn_scalar": raw.get("head_dim")}
        (folder / "config.json").write_text(json.dumps(raw | {k: v for k, v in changes.items() if k in raw}))
        return folder

    return copy


@pytest.fixture
def merged():
    """A function: the model with a LoRA that changes something merged into it."""

    def merge(model: nn.Module, targets: object = None, **options: object) -> nn.Module:
        lowrank.attach(model, LoRAConfig(rank=4, alpha=16), targets, **options)
        torch.manual_seed(1)
        for _, layer in adapted_layers(model, "default"):
            for p in layer.adapters["default"].parameters():
                nn.init.normal_(p, std=0.1)
        lowrank.merge(model, "default")
        return model

    return merge


@pytest.fixture
def tiny() -> nn.Module:
    """A Llama of 92,480 parameters, fp32."""
    return load(FIXTURES / "models" / "llama", dtype=torch.float32, device="cpu", progress=False)[0]
