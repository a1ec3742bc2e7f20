"""Each method's settings pass through YAML and through an adapter file unchanged."""

from dataclasses import asdict

import pytest
from torch import nn

import lowrank
from lowrank.adapter import METHODS
from lowrank.methods.ia3 import IA3Config
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.vera import VeRAConfig
from lowrank.targets import attachments
from lowrank.training.config import read_config, to_yaml


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_reached_from_a_configuration(name: str, tmp_path) -> None:
    config = read_config({"adapter": {"method": name}})
    assert config.adapter.settings == METHODS[name].Config()
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "run.yaml").adapter == config.adapter


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=3, rank_pattern={r"layers\.0\..*": 5}, alpha_pattern={"q_proj": 3.5}),
        IA3Config(feedforward=("0",)),
        VeRAConfig(rank=4, largest=(40, 48)),
    ],
)
def test_settings_come_back_from_an_adapter_file(config, tmp_path) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)})
    lowrank.attach(model, config, ["q_proj", "down_proj"])
    lowrank.save_adapter(model, tmp_path / "a")
    lowrank.detach(model)
    lowrank.load_adapter(model, tmp_path / "a")
    assert attachments(model)["a"].config == config


def test_a_pattern_in_a_configuration_is_a_mapping() -> None:
    settings = {"method": "lora", "rank": 4, "rank_pattern": {"down_proj": 16}}
    config = read_config({"adapter": settings}).adapter.settings
    assert config.rank_pattern == {"down_proj": 16} and asdict(config)["rank"] == 4
