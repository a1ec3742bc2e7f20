"""The quickstart's model, where it is cached or can be fetched; tiny checkpoints of every architecture."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

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
def tiny() -> nn.Module:
    """A Llama of 92,480 parameters, fp32."""
    return load(FIXTURES / "models" / "llama", dtype=torch.float32, device="cpu", progress=False)[0]
