"""Model families as data: how a family's config.json reads, what its modules are called, what it does differently.

One row of FAMILIES is one family. `config_from_json` turns the hub's spelling of a configuration, the older one and the
one that transformers 5 writes, into a ModelConfig; `config_from_gguf` does the same from GGUF metadata. Names of other
projects (`hidden_size`, `attn_q`) live in this file alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowrank.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Rope:
    """Rotary positions: frequencies theta^(-2i / dim), stretched for long contexts as `kind` says."""

    theta: float = 10000.0
    kind: str = "default"
    """default, linear, dynamic, llama3, yarn, longrope, or factors (a divisor for each frequency, from a GGUF file)."""
    dim: int = 0
    """How many of each head's numbers are rotated."""
    interleaved: bool = False
    """Pairs are neighbours (ChatGLM), not the two halves of the head."""
    max_positions: int = 0
    """The context length in the configuration."""
    options: tuple[tuple[str, Any], ...] = ()
    """What the kind needs: factor, low_freq_factor, ... as the checkpoint writes them."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes and the arithmetic of a model; equal for equal models, however spelled."""

    family: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    max_positions: int
    tied: bool
    activation: str = "silu"
    rope: Rope | None = None
    rope_local: Rope | None = None
    """For layers with a window, where they have a base of their own (Gemma 3)."""
    windows: tuple[int | None, ...] = ()
    """For each layer: how many tokens it sees (w means 0 <= i - j < w), or None for all."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attn_scale: float | None = None
    """Multiplies q·k; None is 1 / sqrt(head_dim)."""
    attn_softcap: float | None = None
    final_softcap: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    token_types: int = 0
    labels: tuple[str, ...] = ()
    """The classes of an encoder's head."""
    head: str = "causal"
    """causal; encoders: embed, mlm, tokens, sequence, regression."""


@dataclass(frozen=True)
class Names:
    """The checkpoint's own module paths; "" where a family has no such module."""

    embed: str = "model.embed_tokens"
    positions: str = ""
    layers: str = "model.layers"
    norm: str = "model.norm"
    lm_head: str = "lm_head"
    attn: str = "self_attn"
    mlp: str = "mlp"
    attn_norm: str = "input_layernorm"
    attn_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = ""
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str = ""
    o: str = "o_proj"
    q_norm: str = ""
    k_norm: str = ""
    gate: str = "gate_proj"
    up: str = "up_proj"
    gate_up: str = ""
    down: str = "down_proj"


@dataclass(frozen=True)
class Family:
    name: str
    model_type: str = ""
    """`model_type` in config.json, where it is not the name."""
    names: Names = Names()
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of this family's config.json -> the common spelling that `_read` knows."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the family means where its configuration is silent (common spelling)."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the family's config.json that have one value here: another one is refused."""
    windows: str = "none"
    """Which layers have the window where `layer_types` does not say: none, all, even, pattern, upper."""
    norm: str = "rms"
    """rms, rms+1 (the weight is stored minus one) or layer."""
    embed_scale: bool = False
    """Embeddings are multiplied by sqrt(dim)."""
    conv1d: bool = False
    """Linear weights are stored as (I, O)."""
    rope_interleaved: bool = False
    encoder: bool = False
    gguf: str = ""
    """`general.architecture` of its GGUF files. In "llama" ones q and k have their rows in pairs of neighbours."""


# fmt: off
_GEMMA = Names(
    attn_post_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_GPT2 = Names(
    embed="transformer.wte", positions="transformer.wpe", layers="transformer.h", norm="transformer.ln_f",
    attn="attn", attn_norm="ln_1", mlp_norm="ln_2", qkv="c_attn", o="c_proj", gate="", up="c_fc", down="c_proj",
)
_CHATGLM = Names(
    embed="transformer.embedding.word_embeddings", layers="transformer.encoder.layers",
    norm="transformer.encoder.final_layernorm", lm_head="transformer.output_layer", attn="self_attention",
    qkv="query_key_value", o="dense", gate_up="dense_h_to_4h", down="dense_4h_to_h",
)
_BERT = Names(
    embed="bert.embeddings.word_embeddings", positions="bert.embeddings.position_embeddings",
    layers="bert.encoder.layer", lm_head="classifier",
)
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}
FAMILIES: dict[str, Family] = {f.name: f for f in (
    Family("llama", gguf="llama"),
    Family("mistral", windows="all", defaults={"num_key_value_heads": 8}, gguf="llama"),
    Family("qwen2", windows="upper", defaults={"qkv_bias": True, "use_sliding_window": False}, gguf="qwen2"),
    Family(
        "qwen3", names=Names(q_norm="q_norm", k_norm="k_norm"), windows="upper",
        defaults={"head_dim": 128, "use_sliding_window": False}, gguf="qwen3",
    ),
    Family(
        "gemma2", names=_GEMMA, windows="even", norm="rms+1", embed_scale=True, gguf="gemma2",
        defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    Family(
        "gemma3", "gemma3_text", replace(_GEMMA, q_norm="q_norm", k_norm="k_norm"), windows="pattern", norm="rms+1",
        defaults={**_GEMMA_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4}, embed_scale=True, gguf="gemma3",
    ),
    Family(
        "phi3", names=Names(qkv="qkv_proj", gate_up="gate_up_proj"), windows="all", defaults={"rms_norm_eps": 1e-5},
    ),
    Family(
        "gpt2", names=_GPT2, norm="layer", conv1d=True,
        keys={
            "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
            "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act",
        },
        defaults={
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
            "hidden_act": "gelu_new",
        },
        requires={
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        },
    ),
    Family(
        "chatglm", names=_CHATGLM, rope_interleaved=True,
        keys={
            "num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size", "kv_channels": "head_dim",
            "padded_vocab_size": "vocab_size", "multi_query_group_num": "num_key_value_heads",
            "layernorm_epsilon": "rms_norm_eps", "seq_length": "max_position_embeddings", "add_qkv_bias": "qkv_bias",
        },
        defaults={"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        requires={
            "rmsnorm": True, "post_layer_norm": True, "multi_query_attention": True, "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
        },
    ),
    Family(
        "bert", names=_BERT, norm="layer", encoder=True, keys={"layer_norm_eps": "rms_norm_eps"},
        defaults={
            "rms_norm_eps": 1e-12, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
            "tie_word_embeddings": True,
        },
        requires={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    ),
)}
_REFUSED = {
    "num_local_experts": "a mixture of experts", "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts", "moe_num_experts": "a mixture of experts",
    "vision_config": "a multimodal model", "audio_config": "a multimodal model", "text_config": "a multimodal model",
}
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {  # what each kind cannot do without
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"), "factors": ("factors",),
}
# fmt: on


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.family]


def config_from_json(raw: Any, where: str = "config.json") -> ModelConfig:
    """A checked ModelConfig from a parsed config.json. ConfigError names the file and what is wrong."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must hold a JSON object, got {type(raw).__name__}")
    for key, what in _REFUSED.items():
        if raw.get(key):
            raise ConfigError(f"{where} describes {what} ({key}), which is not implemented; use a dense text model")
    method = raw.get("quantization_config")
    given = method if isinstance(method, dict) else {"quant_method": method}
    name = given.get("quant_method")
    if method and not (name == "bitsandbytes" and given.get("load_in_4bit")):  # which is read as it is
        raise ConfigError(
            f"{where}: the weights are quantized with {name!r}, which is not read; use the original checkpoint"
        )
    known = {family.model_type or name: family for name, family in FAMILIES.items()}
    named = raw.get("model_type")
    if not isinstance(named, str) or named not in known:
        raise ConfigError(
            f"{where} has model_type {named!r}, which is not implemented{did_you_mean(str(named), known)}; "
            f"known: {', '.join(sorted(known))}"
        )
    return _read(known[named], raw, where)


class _Reader:
    """Typed, bounded look-ups in a configuration, with the file's name in each error."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if not fits(value):
            raise ConfigError(f"{self.where}: {key} must be {wanted}, got {str(value)[:80]!r}")
        return value

    def integer(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        found: int = self.get(
            key, default, lambda v: type(v) is int and 0 < v <= most, f"a whole number from 1 to {most}"
        )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.get(key, default, _is_number, "a number"))

    def optional(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.get(key, default, lambda v: isinstance(v, bool), "true or false"))

    def ids(self, key: str) -> tuple[int, ...]:
        def fits(value: Any) -> bool:
            return all(type(i) is int and abs(i) < 1 << 31 for i in (value if isinstance(value, list) else [value]))

        value = self.get(key, [], fits, "a token id or a list of them")
        return tuple(i for i in (value if isinstance(value, list) else [value]) if i >= 0)


def _is_number(value: Any) -> bool:
    """A number that fp32 arithmetic has room for (and no bool, which Python counts as one)."""
    return type(value) in (int, float) and -1e15 < value < 1e15


def _read(family: Family, raw: Mapping[str, Any], where: str) -> ModelConfig:
    for key, wanted in family.requires.items():
        if raw.get(key, wanted) != wanted:
            raise ConfigError(f"{where}: {key} = {raw[key]!r} is not implemented for {family.name}, only {wanted!r}")
    values = {**family.defaults, **{family.keys.get(k, k): v for k, v in raw.items()}}
    read = _Reader(values, where)
    dim, n_heads = read.integer("hidden_size"), read.integer("num_attention_heads", most=1 << 14)
    n_layers = read.integer("num_hidden_layers", most=4096)
    n_kv_heads = read.integer("num_key_value_heads", n_heads, most=n_heads)
    if n_heads % n_kv_heads:
        raise ConfigError(f"{where}: {n_heads} heads cannot share {n_kv_heads} key-value heads evenly")
    if values.get("head_dim") is None and dim % n_heads:
        raise ConfigError(
            f"{where}: hidden_size {dim} is no multiple of its {n_heads} heads, and head_dim is not given"
        )
    head_dim = read.integer("head_dim", dim // n_heads, most=1 << 14)
    max_positions = read.integer("max_position_embeddings", 2048, most=1 << 30)
    activation = values.get("hidden_activation") or values.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ConfigError(f"{where}: activation {activation!r} is not implemented; known: {', '.join(_ACTIVATIONS)}")
    rope, rope_local = _ropes(family, read, head_dim, max_positions)
    scalar, bias = read.optional("query_pre_attn_scalar"), read.flag("attention_bias")
    if scalar is not None and scalar <= 0:
        raise ConfigError(f"{where}: query_pre_attn_scalar must be positive, got {scalar}")
    bos, pad = read.ids("bos_token_id"), read.ids("pad_token_id")
    return ModelConfig(
        family=family.name, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        hidden_dim=read.integer("intermediate_size", 4 * dim), vocab_size=read.integer("vocab_size"),
        norm_eps=float(f"{read.number('rms_norm_eps', 1e-6):.6g}"),  # GGUF stores it in fp32
        max_positions=max_positions, tied=read.flag("tie_word_embeddings"), activation=_ACTIVATIONS[activation],
        rope=rope, rope_local=rope_local, windows=_windows(family, read, n_layers),
        qkv_bias=read.flag("qkv_bias", bias), out_bias=read.flag("out_bias", bias), mlp_bias=read.flag("mlp_bias"),
        attn_scale=None if scalar is None else scalar**-0.5, attn_softcap=read.optional("attn_logit_softcapping"),
        final_softcap=read.optional("final_logit_softcapping"), bos_id=bos[0] if bos else None,
        eos_ids=read.ids("eos_token_id"), pad_id=pad[0] if pad else None,
        **(_encoder_head(read) if family.encoder else {}),
    )  # fmt: skip


_HEADS = {
    "ForMaskedLM": "mlm", "ForPreTraining": "mlm", "ForTokenClassification": "tokens",
    "ForSequenceClassification": "sequence", "Model": "embed",
}  # fmt: skip


def _encoder_head(read: _Reader) -> dict[str, Any]:
    """Which head the configuration's class name stands for, and its classes."""
    named = read.values.get("architectures") or ["BertModel"]
    name = str(named[0] if isinstance(named, list) else named)
    head = next((head for ending, head in _HEADS.items() if name.endswith(ending)), None)
    if head is None:
        raise ConfigError(f"{read.where}: architecture {name!r} is not implemented; known endings: {', '.join(_HEADS)}")
    found: dict[str, Any] = {"head": head, "token_types": read.integer("type_vocab_size", most=1 << 16)}
    if head not in ("tokens", "sequence"):
        return found
    by_id = read.values.get("id2label")
    if by_id is None:
        by_id = {i: f"LABEL_{i}" for i in range(read.integer("num_labels", 2, most=1 << 16))}
    try:
        labels = tuple(str(by_id[key]) for key in sorted(by_id, key=int))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{read.where}: id2label must map class numbers to names, got {by_id!r}") from error
    if head == "sequence" and (len(labels) == 1 or read.values.get("problem_type") == "regression"):
        found["head"] = "regression"
    return found | {"labels": labels}


def _windows(family: Family, read: _Reader, n_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` where the file has it, else by the family's rule."""
    if read.values.get("sliding_window") is None or not read.flag("use_sliding_window", True):
        return (None,) * n_layers
    window = read.integer("sliding_window", most=1 << 30)
    types = read.values.get("layer_types")
    if types is not None and family.windows != "none":
        if not isinstance(types, list) or len(types) != n_layers:
            raise ConfigError(f"{read.where}: layer_types must name the kind of each of the {n_layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    pattern = read.integer("sliding_window_pattern", 6) if family.windows == "pattern" else 0
    first = read.integer("max_window_layers", n_layers) if family.windows == "upper" else 0
    rules = {
        "none": lambda i: False,
        "all": lambda i: True,
        "even": lambda i: i % 2 == 0,
        "pattern": lambda i: (i + 1) % pattern != 0,
        "upper": lambda i: i >= first,
    }
    return tuple(window if rules[family.windows](i) else None for i in range(n_layers))


def _ropes(family: Family, read: _Reader, head_dim: int, max_positions: int) -> tuple[Rope | None, Rope | None]:
    """(rope, rope of the layers with a window), from either spelling of the configuration."""
    if family.names.positions:
        return None, None
    values, local = read.values, None
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if isinstance(given, dict) and "full_attention" in given:
        given, local = given["full_attention"], given.get("sliding_attention")
    elif values.get("rope_local_base_freq") is not None:
        local = {"rope_theta": values["rope_local_base_freq"]}
    ropes = [None if one is None else _rope(family, one, read, head_dim, max_positions) for one in (given, local)]
    return ropes[0], ropes[1]


def _rope(family: Family, given: Any, read: _Reader, head_dim: int, max_positions: int) -> Rope:
    if not isinstance(given, dict):
        raise ConfigError(f"{read.where}: the rope's parameters must be an object, got {given!r}")
    inner = _Reader({**read.values, **{k: v for k, v in given.items() if v is not None}}, read.where)
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise ConfigError(f"{read.where}: rope type {kind!r} is not implemented; known: {', '.join(_ROPE_NEEDS)}")
    dim = inner.number("partial_rotary_factor", 1.0) * head_dim // 2 * 2
    if not 4 <= dim <= head_dim:
        raise ConfigError(f"{read.where}: {dim:g} of a head's {head_dim} numbers are to be rotated, wanted 4 or more")
    theta = inner.number("rope_theta", 10000.0) * inner.number("rope_ratio", 1.0)  # ChatGLM's long variant
    if theta <= 1:
        raise ConfigError(f"{read.where}: rope_theta must be above 1, got {theta:g}")
    options = {}
    if kind != "default":
        named = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k not in named}
        original = read.values.get("original_max_position_embeddings")
        if kind in ("longrope", "yarn") and original is not None:
            options.setdefault("original_max_position_embeddings", original)
        for key in {*_ROPE_NEEDS[kind], *options}:
            _check_rope_option(key, options.get(key), int(dim) // 2, kind, read.where)
    return Rope(theta, kind, int(dim), family.rope_interleaved, max_positions, tuple(sorted(options.items())))


def _check_rope_option(key: str, value: Any, frequencies: int, kind: str, where: str) -> None:
    """Positive numbers; one divisor for each frequency where there is a list of them."""
    if key.endswith(("_factor", "factors")) and isinstance(value, tuple):
        fits = len(value) == frequencies and all(_is_number(v) and v > 0 for v in value)
    elif key in ("truncate", "mrope_interleaved", "finetuned") or (value is None and key not in _ROPE_NEEDS[kind]):
        fits = value is None or isinstance(value, bool)
    else:
        fits = _is_number(value) and value > (1 if key == "original_max_position_embeddings" else 0)
    if not fits:
        raise ConfigError(f"{where}: rope type {kind!r} cannot work with {key} = {str(value)[:80]}")


# fmt: off
_KEYS = (  # ours, in config.json, in GGUF metadata
    ("dim", "hidden_size", "embedding_length"), ("n_layers", "num_hidden_layers", "block_count"),
    ("n_heads", "num_attention_heads", "attention.head_count"), ("head_dim", "head_dim", "attention.key_length"),
    ("n_kv_heads", "num_key_value_heads", "attention.head_count_kv"),
    ("hidden_dim", "intermediate_size", "feed_forward_length"),
    ("max_positions", "max_position_embeddings", "context_length"),
    ("norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("attn_softcap", "attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_softcap", "final_logit_softcapping", "final_logit_softcapping"),
    ("", "rope_theta", "rope.freq_base"), ("", "sliding_window", "attention.sliding_window"),
)
_GGUF_MODULES = {  # where a role of Names stands -> its GGUF name
    "": {
        "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm", "mlp_norm": "ffn_norm",
        "mlp_post_norm": "post_ffw_norm",
    },
    "attn": {
        "q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output", "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
    },
    "mlp": {"gate": "ffn_gate", "up": "ffn_up", "gate_up": "ffn_up", "down": "ffn_down"},
}
# fmt: on


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    where: str,
    rope_factors: tuple[float, ...] | None = None,
) -> ModelConfig:
    """A ModelConfig from GGUF metadata, the shapes of its tensors and the content of `rope_freqs.weight`."""
    architecture = metadata.get("general.architecture")
    known = [name for name, family in FAMILIES.items() if family.gguf == name]
    if architecture not in known:
        raise ConfigError(
            f"{where} has architecture {architecture!r}, which is not implemented"
            f"{did_you_mean(str(architecture), known)}; known: {', '.join(sorted(known))}"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise ConfigError(f"{where} describes a mixture of experts, which is not implemented; use a dense text model")
    raw = {json: metadata.get(f"{architecture}.{theirs}") for _, json, theirs in _KEYS}
    scaling = metadata.get(f"{architecture}.rope.scaling.type")
    if scaling not in ("none", None):
        options = {"rope_type": scaling, "factor": metadata.get(f"{architecture}.rope.scaling.factor", 1.0)}
        original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
        raw["rope_scaling"] = options | ({} if original is None else {"original_max_position_embeddings": original})
    if rope_factors is not None:  # Llama 3's scaling, computed when the file was written
        raw["rope_scaling"] = {"rope_type": "factors", "factors": list(rope_factors)}
    if len(tensors.get("token_embd.weight", ())) != 2:
        raise ConfigError(f"{where} has no tensor token_embd.weight of two dimensions: it is no complete model")
    raw["vocab_size"] = tensors["token_embd.weight"][0]
    raw["tie_word_embeddings"] = "output.weight" not in tensors
    raw["attention_bias"], raw["mlp_bias"] = "blk.0.attn_output.bias" in tensors, "blk.0.ffn_up.bias" in tensors
    raw["qkv_bias"] = "blk.0.attn_q.bias" in tensors
    for ours, theirs in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        raw[ours] = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    config = _read(FAMILIES[str(architecture)], {k: v for k, v in raw.items() if v is not None}, where)
    return replace(config, attn_scale=gguf_scale(config))


def config_to_json(c: ModelConfig) -> dict[str, Any]:
    """config.json of a model that came without one. ValueError where the family's own spelling cannot say it."""
    family = family_of(c)
    raw: dict[str, Any] = {json: getattr(c, ours) for ours, json, _ in _KEYS if ours}
    window = next(filter(None, c.windows), None)
    raw |= {
        "model_type": family.model_type or c.family, "architectures": [f"{c.family.capitalize()}ForCausalLM"],
        "vocab_size": c.vocab_size, "tie_word_embeddings": c.tied, "attention_bias": c.out_bias, "mlp_bias": c.mlp_bias,
        **dict.fromkeys(("hidden_act", "hidden_activation"), c.activation.replace("gelu_tanh", "gelu_pytorch_tanh")),
        "bos_token_id": c.bos_id, "pad_token_id": c.pad_id, "sliding_window": window,
        "eos_token_id": c.eos_ids[0] if len(c.eos_ids) == 1 else list(c.eos_ids) or None,
    }  # fmt: skip
    if c.attn_scale is not None:
        scalar = round(c.attn_scale**-2, 6)
        raw["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
    if window is not None:
        types = ["full_attention" if w is None else "sliding_attention" for w in c.windows]
        raw |= {"layer_types": types, "use_sliding_window": True}
    if c.rope is not None:
        raw |= {"rope_theta": c.rope.theta, "rope_scaling": None}
        if c.rope.kind != "default":
            raw["rope_scaling"] = {"rope_type": c.rope.kind, **dict(c.rope.options)}
    if c.rope_local is not None:
        raw["rope_local_base_freq"] = c.rope_local.theta
    if config_from_json(raw) != c:
        raise ValueError(f"a config.json of family {c.family!r} cannot say all of {c}")
    return raw


def gguf_metadata(c: ModelConfig) -> dict[str, Any]:
    """What a GGUF file's metadata say of the model; `config_from_gguf` reads it back."""
    family = family_of(c)
    if not family.gguf or c.rope is None:
        known = ", ".join(name for name, f in FAMILIES.items() if f.gguf)
        raise ValueError(f"a GGUF file is written for {known}; for family {c.family!r} export a Hugging Face folder")
    found = {theirs: getattr(c, ours) for ours, _, theirs in _KEYS if ours}
    found |= {
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.rope.dim,
        "rope.freq_base": c.rope.theta,
        "attention.sliding_window": next(filter(None, c.windows), None),
        "vocab_size": c.vocab_size,
    }
    if c.rope.kind in ("linear", "yarn"):
        options = dict(c.rope.options)
        found |= {"rope.scaling.type": c.rope.kind, "rope.scaling.factor": float(options["factor"])}
        found["rope.scaling.original_context_length"] = options.get("original_max_position_embeddings")
    named = {f"{family.gguf}.{key}": value for key, value in found.items() if value is not None}
    return {"general.architecture": family.gguf, **named}


def gguf_scale(config: ModelConfig) -> float | None:
    """What llama.cpp multiplies q·k with: the file does not say it. 46 and 62 layers are the Gemmas of 27B."""
    if not config.family.startswith("gemma"):
        return None
    return float(config.dim / config.n_heads if config.n_layers in (46, 62) else config.head_dim) ** -0.5


def gguf_name(config: ModelConfig, path: str) -> str:
    """The GGUF tensor that fills the parameter `path` of our model."""
    names = family_of(config).names
    module, _, leaf = path.rpartition(".")
    top = {names.embed: "token_embd", names.norm: "output_norm", names.lm_head: "output"}
    if module in top:
        return f"{top[module]}.{leaf}"
    layer, _, rest = module.removeprefix(names.layers + ".").partition(".")
    for where, roles in _GGUF_MODULES.items():
        prefix = f"{getattr(names, where)}." if where else ""
        for role, theirs in roles.items():
            if getattr(names, role) and rest == prefix + getattr(names, role):
                return f"blk.{layer}.{theirs}.{leaf}"
    raise KeyError(f"parameter {path!r} of family {config.family!r} has no GGUF name")
