"""How PEFT writes each method: the names in its configuration and of its tensors. `peft_format.py` goes by it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank.errors import FileFormatError
from lowrank.methods.adalora import AdaLoRAConfig
from lowrank.methods.dora import DoRAConfig
from lowrank.methods.ia3 import IA3Config
from lowrank.methods.loha import LoHaConfig
from lowrank.methods.lokr import LoKrConfig
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.oft import OFTConfig
from lowrank.methods.p_tuning import PTuningConfig
from lowrank.methods.prefix import PrefixConfig
from lowrank.methods.prompt import PromptConfig
from lowrank.methods.vera import VeRAConfig

PREFIX = "base_model.model."
COMMON = (
    "peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias "
    "fan_in_fan_out megatron_core megatron_config qalora_group_size init_lora_weights init_weights "
    "runtime_config loftq_config "
)


@dataclass(frozen=True)
class Format:
    """How PEFT writes one method."""

    peft_type: str
    config: Callable[..., Any]
    """Ours."""
    fields: Mapping[str, str]
    """Their settings -> ours."""
    tensors: tuple[str, ...]
    """Their names of a layer's tensors; ours are the same without ".weight"."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What is written beside the fields, whatever the configuration says."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """Their defaults where ours are others."""
    ignored: str = ""
    """Settings that do not change the numbers; one that is not named here and is switched on is refused."""
    read_more: Callable[[dict[str, Any]], dict[str, Any]] = lambda theirs: {}
    """Our settings that are more than another name."""
    write_more: Callable[[Any], dict[str, Any]] = lambda config: {}
    """The way back."""

    def known(self) -> set[str]:
        return {*self.fields, *self.constants, *(COMMON + self.ignored).split()}

    def read(self, theirs: dict[str, Any]) -> Any:
        """Their configuration -> ours."""
        given = {**self.absent, **{key: value for key, value in theirs.items() if value is not None}}
        same = {ours: given[key] for key, ours in self.fields.items() if key in given}
        return self.config(**same, **self.read_more(theirs))

    def write(self, config: Any) -> dict[str, Any]:
        same = {key: getattr(config, ours) for key, ours in self.fields.items()}
        return {**same, **self.constants, **self.write_more(config)}


def _read_adalora(c: dict[str, Any]) -> dict[str, Any]:
    total, masks = c.get("total_step") or 0, c.get("rank_pattern") or {}
    alive = {re.escape(name.removeprefix(PREFIX).split(".lora_E")[0]): sum(mask) for name, mask in masks.items()}
    shares = {"start": c.get("tinit", 0) / total, "end": 1 - c.get("tfinal", 0) / total} if total else {}
    target = min(c.get("target_r", 8), c.get("init_r", 12))
    return {"target_rank": target, "rank_pattern": alive, **shares}


def _write_adalora(config: AdaLoRAConfig) -> dict[str, Any]:
    shares = {"tinit": round(1000 * config.start), "tfinal": round(1000 * (1 - config.end)), "total_step": 1000}
    return {"target_r": config.target_rank, **shares}


def _read_ia3(c: dict[str, Any]) -> dict[str, Any]:
    value = c.get("feedforward_modules")
    if isinstance(value, str):
        raise FileFormatError(f"feedforward_modules as a regular expression ({value!r}) is not read; list the names")
    return {"feedforward": tuple(value or ())}


def _read_oft(c: dict[str, Any]) -> dict[str, Any]:
    return {"neumann_terms": c.get("num_cayley_neumann_terms", 5) if c.get("use_cayley_neumann", True) else 0}


def _write_oft(config: OFTConfig) -> dict[str, Any]:
    return {"use_cayley_neumann": config.neumann_terms > 0, "num_cayley_neumann_terms": config.neumann_terms or 5}


LORA = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rank_stabilized"}
LORA |= {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
ADALORA = {"init_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "deltaT": "every"}
ADALORA |= {"beta1": "beta1", "beta2": "beta2", "orth_reg_weight": "orthogonality"}
VERA = {"r": "rank", "d_initial": "d_initial", "vera_dropout": "dropout", "projection_prng_key": "seed"}
VERA |= {"save_projection": "save_projection"}
LOHA = {"r": "rank", "alpha": "alpha"}
LOKR = LOHA | {"decompose_factor": "factor", "decompose_both": "decompose_both"}
TOKENS = {"num_virtual_tokens": "tokens"}
SIZES = "token_dim num_transformer_submodules num_attention_heads num_layers "
MATRICES = ("lora_A.weight", "lora_B.weight")
EIGHT = {"lora_alpha": 8}
W1, W2 = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")

FORMATS: dict[str, Format] = {
    "lora": Format(
        "LORA", LoRAConfig, LORA, (*MATRICES, "lora_embedding_A", "lora_embedding_B"),
        constants={"use_dora": False, "bias": "none"}, absent=EIGHT,
    ),
    "dora": Format(
        "LORA", DoRAConfig, LORA, (*MATRICES, "lora_magnitude_vector"),
        constants={"use_dora": True, "bias": "none"}, absent=EIGHT,
    ),
    "adalora": Format(
        "ADALORA", AdaLoRAConfig, ADALORA, ("lora_A", "lora_B", "lora_E"), absent=EIGHT,
        ignored="r target_r tinit tfinal total_step rank_pattern", read_more=_read_adalora, write_more=_write_adalora,
    ),
    "ia3": Format(
        "IA3", IA3Config, {}, ("ia3_l",), ignored="feedforward_modules init_ia3_weights",
        read_more=_read_ia3, write_more=lambda config: {"feedforward_modules": list(config.feedforward)},
    ),
    "vera": Format(
        "VERA", VeRAConfig, VERA, ("vera_lambda_b", "vera_lambda_d"), absent={"save_projection": True},
    ),
    "loha": Format("LOHA", LoHaConfig, LOHA, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "lokr": Format("LOKR", LoKrConfig, LOKR, (*W1, *W2)),
    "oft": Format(
        "OFT", OFTConfig, {"oft_block_size": "block_size"}, ("oft_R.weight",), constants={"r": 0},
        absent={"oft_block_size": 32}, ignored="use_cayley_neumann num_cayley_neumann_terms eps",
        read_more=_read_oft, write_more=_write_oft,
    ),
    "prompt": Format(
        "PROMPT_TUNING", PromptConfig, TOKENS, ("prompt_embeddings",),
        constants={"prompt_tuning_init": "RANDOM"}, ignored=SIZES,
    ),
    "p_tuning": Format(
        "P_TUNING", PTuningConfig, TOKENS, ("prompt_embeddings",), read_more=lambda theirs: {"encoder": "none"},
        write_more=lambda config: {"encoder_hidden_size": config.hidden},
        ignored=SIZES + "encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout",
    ),
    "prefix": Format(
        "PREFIX_TUNING", PrefixConfig, TOKENS, ("prompt_embeddings",),
        constants={"prefix_projection": False}, ignored=SIZES + "encoder_hidden_size",
    ),
}  # fmt: skip
