"""Configurations: what is read, what is refused and with which words."""

import pytest

from lowrank.errors import ConfigError
from lowrank.methods.lora import LoRAConfig
from lowrank.training.config import RunConfig, read_config, recipe_path, to_yaml
from lowrank.training.run import run_folder


@pytest.mark.parametrize("name", ["quickstart", "smoke"])
def test_bundled_recipes_are_read(name: str) -> None:
    config = read_config(name)
    assert config.recipe == name and config.model == "quickstart" and config.quantize == "nf4-dq"
    assert isinstance(config.adapter.settings, LoRAConfig)


def test_no_configuration_is_the_quickstart() -> None:
    assert read_config() == read_config("quickstart")


def test_key_value_overrides_the_file() -> None:
    config = read_config(
        "smoke", ["adapter.rank=3", "train.lr=1e-3", "adapter.targets=[q_proj,v_proj]", "quantize=null"]
    )
    assert config.adapter.settings.rank == 3
    assert config.train.lr == 1e-3
    assert list(config.adapter.targets) == ["q_proj", "v_proj"]
    assert config.quantize is None


def test_the_resolved_configuration_reads_back(tmp_path) -> None:
    config = read_config("smoke", ["train.seed=5", "adapter.alpha=7"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_aliases_are_echoed_once(tmp_path, capsys) -> None:
    (tmp_path / "theirs.yaml").write_text("lora_r: 4\nlora_alpha: 9\ncutoff_len: 99\nper_device_train_batch_size: 2\n")
    config = read_config(tmp_path / "theirs.yaml")
    assert config.adapter.settings == LoRAConfig(rank=4, alpha=9)
    assert config.data.max_length == 99 and config.train.micro_batch_size == 2
    said = capsys.readouterr().out.splitlines()
    assert "config: lora_r is read as adapter.rank" in said and len(said) == len(set(said)) == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("adaptor: {rank: 3}", r"unknown key 'adaptor' \(did you mean 'adapter'\?\)"),
        ("adapter: {ranc: 3}", r"unknown key 'adapter.ranc' \(did you mean 'rank'\?\)"),
        ("train: {learning_rat: 3}", "unknown key 'train.learning_rat'"),
        ("train: {lr: fast}", "train: "),
        ("train: {lr: -1}", "train: lr must be positive, got -1"),
        ("adapter: {method: lara}", r"unknown adapter.method 'lara' \(did you mean 'lora'\?\)"),
        ("adapter: {rank: 0}", "rank must be at least 1, got 0"),
        ("quantize: nf5", r"unknown .*'nf5'"),
        ("dtype: float17", r"unknown dtype 'float17'"),
        ("data: [1]", "data must be a group of keys"),
        ("- 1\n- 2", "must be a mapping"),
        ("a: [", "is not valid YAML"),
        ("lora_r: 3\nadapter: {rank: 4}", "'lora_r' is another name for 'adapter.rank', and both are given"),
        ("train: {patience: 3}", "patience and keep_best need eval_every"),
        ("data: {general_loss: mse}", "data.general_loss must be one of kl, ce"),
        ("eval: {tasks: [riddles]}", "unknown eval task 'riddles'"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "bad.yaml")


def test_a_file_s_alias_is_overridden_on_the_command_line(tmp_path, capsys) -> None:
    (tmp_path / "theirs.yaml").write_text("lora_r: 8\nadapter:\n")
    assert read_config(tmp_path / "theirs.yaml", ["lora_r=4"]).adapter.settings.rank == 4
    assert read_config(tmp_path / "theirs.yaml", ["adapter.rank=5"]).adapter.settings.rank == 5
    assert "lora_r is read as adapter.rank" in capsys.readouterr().out


def test_a_missing_file_names_the_recipes() -> None:
    with pytest.raises(ConfigError, match=r"no configuration file 'quikstart' \(did you mean 'quickstart'\?\)"):
        recipe_path("quikstart")
    with pytest.raises(ConfigError, match="wanted key=value"):
        read_config("smoke", ["train.lr"])


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("x")
    config = RunConfig(output_dir=str(tmp_path / "old"))
    with pytest.raises(ConfigError, match=r"holds a run or other files already: .*--resume"):
        run_folder(config, resume=False)
    assert run_folder(config, resume=True) == tmp_path / "old"
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_folder(RunConfig(output_dir=str(tmp_path / "new")), resume=True)


def test_run_folders_are_numbered(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(recipe="mine")
    assert str(run_folder(config, resume=False)) == "runs/mine-001"
    (tmp_path / "runs" / "mine-007").mkdir(parents=True)
    assert str(run_folder(config, resume=False)) == "runs/mine-008"
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_folder(RunConfig(recipe="other"), resume=True)


@pytest.mark.parametrize("value", ["[q_proj", "{x: 1", "a: b"])
def test_an_override_that_is_no_yaml_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="the value is not YAML"):
        read_config("smoke", [f"adapter.targets={value}"])
