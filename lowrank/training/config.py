"""A run's whole configuration: a YAML file, then `key=value`, into frozen dataclasses beside the code that reads them.

    model · quantize · dtype · device · adapter.{method, targets, exclude, train_also, and the method's own} ·
    data.* · train.* · eval.* · output_dir

An unknown key is an error that names the nearest one. Names that other tools use are read as aliases, each echoed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowrank import methods as methods  # registers them
from lowrank.adapter import METHODS
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, did_you_mean, unknown
from lowrank.evaluation.config import EvalConfig
from lowrank.quant.tensor import parse_format
from lowrank.targets import Targets
from lowrank.training.loop import TrainConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")

ALIASES = {
    "base_model": "model",
    "model_name_or_path": "model",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "modules_to_save": "adapter.train_also",
    "dataset": "data.path",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "batch_size": "train.batch_size",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.clip",
    "gradient_checkpointing": "train.checkpointing",
    "seed": "train.seed",
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which method goes where; `settings` are the method's own (its Config), checked against it."""

    method: str = "lora"
    targets: Targets = None
    exclude: tuple[str, ...] = ()
    train_also: tuple[str, ...] = ()
    settings: Any = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    model: str = "quickstart"
    """"quickstart", a Hugging Face folder, or a GGUF file."""

    quantize: str | None = "nf4-dq"
    """The frozen base's format: nf4, nf4-dq, fp4, fp4-dq, int8, int4, int4-affine, or null for none."""

    dtype: str = "auto"
    """What is computed in. auto: float32 on a CPU without bf16 products, else bfloat16; a run keeps its choice."""

    device: str = "auto"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output_dir: str | None = None
    """The run's folder; null takes runs/<recipe>-NNN."""

    recipe: str = "run"
    """The recipe's name, for the run's folder and its report."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.quantize not in (None, "keep"):
            parse_format(self.quantize)


def read_config(
    source: str | Path | RunConfig | dict[str, Any] | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """A RunConfig from a YAML file, a bundled recipe's name, a dictionary, or nothing (the quickstart recipe)."""
    if isinstance(source, RunConfig):
        return source
    if isinstance(source, dict):
        node: Any = OmegaConf.create(source)
        name = "run"
    else:
        path = recipe_path("quickstart" if source is None else source)
        name = path.stem
        try:
            node = OmegaConf.create(path.read_text(encoding="utf-8"))
        except Exception as error:  # YAML errors come in many classes; the file's name is what the reader needs
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"a configuration must be a mapping of keys to values, got {type(node).__name__}")
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    node = OmegaConf.create(_without_aliases(values))
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"wanted key=value, such as train.lr=1e-3, got {item!r}")
        try:
            parsed = OmegaConf.create(f"v: {value}").v
        except Exception as error:  # as above: YAML's own errors are no ValueErrors
            raise ConfigError(f"{item!r}: the value is not YAML; put it into quotes, as in '{key}=\"...\"'") from error
        if key in ALIASES:
            print(f"config: {key} is read as {ALIASES[key]}")
        OmegaConf.update(node, ALIASES.get(key, key), parsed, merge=False)
    final: Any = OmegaConf.to_container(node, resolve=True)
    return _run_config(final, name)


def recipe_path(source: str | Path) -> Path:
    """A file, or the bundled recipe of that name."""
    if Path(source).is_file():
        return Path(source)
    bundled = {
        p.name.removesuffix(".yaml"): p
        for p in resources.files("lowrank.recipes").iterdir()
        if p.name.endswith(".yaml")
    }
    if str(source) in bundled:
        return Path(str(bundled[str(source)]))
    raise ConfigError(
        f"no configuration file {str(source)!r}{did_you_mean(str(source), bundled)};"
        f" bundled recipes: {', '.join(sorted(bundled))}"
    )


def _without_aliases(values: dict[Any, Any]) -> dict[str, Any]:
    """Other tools' names moved to ours, each echoed once; two spellings of one setting are an error."""
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if key not in ALIASES:
            empty = {} if value is None and key in ("adapter", "data", "train", "eval") else value
            clean[key] = dict(value) if isinstance(value, dict) else empty
    for key in values.keys() & ALIASES.keys():
        path = ALIASES[key].split(".")
        target = clean
        for part in path[:-1]:
            target = target.setdefault(part, {})
        if path[-1] in target:
            raise ConfigError(f"{key!r} is another name for {ALIASES[key]!r}, and both are given; keep one")
        target[path[-1]] = values[key]
        print(f"config: {key} is read as {ALIASES[key]}")
    return clean


def _run_config(values: dict[str, Any], name: str) -> RunConfig:
    groups = {"data": DataConfig, "train": TrainConfig, "eval": EvalConfig}
    known = [f.name for f in fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {key!r}{did_you_mean(str(key), [*known, *ALIASES])}; known: {', '.join(known)}"
            )
    ready: dict[str, Any] = {"recipe": name}
    for key, value in values.items():
        if key == "adapter":
            ready[key] = _adapter_config(_mapping(value, key))
        elif key in groups:
            ready[key] = _structured(groups[key], _mapping(value, key), key)
        else:
            ready[key] = value
    ready.setdefault("adapter", _adapter_config({}))
    plain = {k: v for k, v in ready.items() if k not in (*groups, "adapter")}
    checked = {k: (None if v is None else str(v)) for k, v in plain.items()}
    try:
        return RunConfig(**(ready | checked))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _adapter_config(values: dict[str, Any]) -> AdapterConfig:
    method = values.get("method", "lora")
    if method not in METHODS:
        raise ConfigError(str(unknown("adapter.method", method, METHODS)))
    common = {key: values[key] for key in ("targets", "exclude", "train_also") if values.get(key) is not None}
    for key in ("exclude", "train_also"):
        if isinstance(common.get(key), str):
            raise ConfigError(f"adapter.{key} must be a list of names, got the string {common[key]!r}")
        if key in common:
            common[key] = tuple(common[key])
    own = {key: value for key, value in values.items() if key not in ("method", "targets", "exclude", "train_also")}
    return AdapterConfig(method=method, settings=_structured(METHODS[method].Config, own, "adapter"), **common)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a group of keys, got {value!r}")
    return value


def _structured(schema: type, values: dict[str, Any], group: str) -> Any:
    """An instance of the dataclass `schema`, types checked by OmegaConf, unknown keys refused with the nearest name."""
    known = [f.name for f in fields(schema)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key '{group}.{key}'{did_you_mean(str(key), known)}; known: {', '.join(known)}")
    try:
        # OmegaConf keeps a frozen schema read-only, so the values are merged into its copy by flag
        node = OmegaConf.structured(schema)
        OmegaConf.set_readonly(node, False)
        return OmegaConf.to_object(OmegaConf.merge(node, values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{group}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ConfigError(f"{group}: {error}") from error


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that `read_config` reads back to an equal value."""
    groups = {group: vars(getattr(config, group)) for group in ("data", "train", "eval", "adapter")}
    own = vars(groups["adapter"]["settings"])
    adapter = {key: value for key, value in groups["adapter"].items() if key != "settings"}
    return OmegaConf.to_yaml(OmegaConf.create(vars(config) | groups | {"adapter": adapter | own}))
