"""How PEFT writes each method: the names in its configuration and of its tensors. `peft_format.py` goes by it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COMMON = _words(
    "peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias "
    "fan_in_fan_out megatron_core megatron_config qalora_group_size init_lora_weights init_weights "
    "runtime_config loftq_config"
)


@dataclass(frozen=True)
class Format:
    """How PEFT writes one method."""

    peft_type: str
    settings: tuple[str, ...]
    """Names in their configuration that `read` understands; any other one that is switched on is refused."""
    read: Callable[[dict[str, Any]], Any]
    """Their configuration -> ours."""
    write: Callable[[Any], dict[str, Any]]
    tensors: tuple[str, ...]
    """Their names of a layer's tensors; ours are the same without ".weight"."""


def _lora(cls: type[LoRAConfig]) -> Callable[[dict[str, Any]], LoRAConfig]:
    return lambda c: cls(
        rank=c.get("r", 8),
        alpha=c.get("lora_alpha", 8),
        dropout=c.get("lora_dropout", 0.0),
        rank_stabilized=bool(c.get("use_rslora")),
        rank_pattern=dict(c.get("rank_pattern") or {}),
        alpha_pattern=dict(c.get("alpha_pattern") or {}),
    )


def _write_lora(config: LoRAConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "use_dora": isinstance(config, DoRAConfig),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "bias": "none",
    }


def _read_adalora(c: dict[str, Any]) -> AdaLoRAConfig:
    total, rank = c.get("total_step") or 0, c.get("init_r", 12)
    alive = {
        re.escape(name.removeprefix(PREFIX).split(".lora_E")[0]): sum(mask)
        for name, mask in (c.get("rank_pattern") or {}).items()
    }
    return AdaLoRAConfig(
        rank=rank,
        alpha=c.get("lora_alpha", 8),
        dropout=c.get("lora_dropout", 0.0),
        target_rank=min(c.get("target_r", 8), rank),
        start=c.get("tinit", 0) / total if total else 0.1,
        end=1 - c.get("tfinal", 0) / total if total else 0.7,
        every=c.get("deltaT", 1),
        beta1=c.get("beta1", 0.85),
        beta2=c.get("beta2", 0.85),
        orthogonality=c.get("orth_reg_weight", 0.5),
        rank_pattern=alive,
    )


def _write_adalora(config: AdaLoRAConfig) -> dict[str, Any]:
    return {
        "init_r": config.rank,
        "target_r": config.target_rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "tinit": round(1000 * config.start),
        "tfinal": round(1000 * (1 - config.end)),
        "deltaT": config.every,
        "total_step": 1000,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality,
    }


def _suffixes(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise FileFormatError(f"feedforward_modules as a regular expression ({value!r}) is not read; list the names")
    return tuple(value or ())


FORMATS: dict[str, Format] = {
    "lora": Format(
        "LORA",
        ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        _lora(LoRAConfig),
        _write_lora,
        ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
    ),
    "dora": Format(
        "LORA",
        ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        _lora(DoRAConfig),
        _write_lora,
        ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    ),
    "adalora": Format(
        "ADALORA",
        _words(
            "r init_r target_r lora_alpha lora_dropout tinit tfinal deltaT total_step beta1 beta2 "
            "orth_reg_weight rank_pattern"
        ),
        _read_adalora,
        _write_adalora,
        ("lora_A", "lora_B", "lora_E"),
    ),
    "ia3": Format(
        "IA3",
        ("feedforward_modules", "init_ia3_weights"),
        lambda c: IA3Config(feedforward=_suffixes(c.get("feedforward_modules"))),
        lambda config: {"feedforward_modules": list(config.feedforward)},
        ("ia3_l",),
    ),
    "vera": Format(
        "VERA",
        ("r", "d_initial", "vera_dropout", "projection_prng_key", "save_projection"),
        lambda c: VeRAConfig(
            rank=c.get("r", 256),
            d_initial=c.get("d_initial", 0.1),
            dropout=c.get("vera_dropout", 0.0),
            seed=c.get("projection_prng_key", 0),
            save_projection=bool(c.get("save_projection", True)),
        ),
        lambda config: {
            "r": config.rank,
            "d_initial": config.d_initial,
            "vera_dropout": config.dropout,
            "projection_prng_key": config.seed,
            "save_projection": config.save_projection,
        },
        ("vera_lambda_b", "vera_lambda_d"),
    ),
    "loha": Format(
        "LOHA",
        ("r", "alpha"),
        lambda c: LoHaConfig(rank=c.get("r", 8), alpha=c.get("alpha", 8)),
        lambda config: {"r": config.rank, "alpha": config.alpha},
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ),
    "lokr": Format(
        "LOKR",
        ("r", "alpha", "decompose_both", "decompose_factor"),
        lambda c: LoKrConfig(
            rank=c.get("r", 8),
            alpha=c.get("alpha", 8),
            factor=c.get("decompose_factor", -1),
            decompose_both=bool(c.get("decompose_both")),
        ),
        lambda config: {
            "r": config.rank,
            "alpha": config.alpha,
            "decompose_factor": config.factor,
            "decompose_both": config.decompose_both,
        },
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    ),
    "oft": Format(
        "OFT",
        ("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "eps"),
        lambda c: OFTConfig(
            block_size=c.get("oft_block_size", 32),
            neumann_terms=c.get("num_cayley_neumann_terms", 5) if c.get("use_cayley_neumann", True) else 0,
        ),
        lambda config: {
            "r": 0,
            "oft_block_size": config.block_size,
            "use_cayley_neumann": config.neumann_terms > 0,
            "num_cayley_neumann_terms": config.neumann_terms or 5,
        },
        ("oft_R.weight",),
    ),
    "prompt": Format(
        "PROMPT_TUNING",
        _words(
            "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
            "prompt_tuning_init"
        ),
        lambda c: PromptConfig(tokens=c["num_virtual_tokens"]),
        lambda config: {"num_virtual_tokens": config.tokens, "prompt_tuning_init": "RANDOM"},
        ("prompt_embeddings",),
    ),
    "p_tuning": Format(
        "P_TUNING",
        _words(
            "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
            "encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout"
        ),
        lambda c: PTuningConfig(tokens=c["num_virtual_tokens"], encoder="none"),
        lambda config: {"num_virtual_tokens": config.tokens, "encoder_hidden_size": config.hidden},
        ("prompt_embeddings",),
    ),
    "prefix": Format(
        "PREFIX_TUNING",
        _words(
            "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
            "encoder_hidden_size prefix_projection"
        ),
        lambda c: PrefixConfig(tokens=c["num_virtual_tokens"]),
        lambda config: {"num_virtual_tokens": config.tokens, "prefix_projection": False},
        ("prompt_embeddings",),
    ),
}  # fmt: skip
