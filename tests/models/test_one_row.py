"""Decoding one row by whole layers: which models take part, and the numbers that they get."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.methods.lora import LoRAConfig
from lowrank.models.decoder import MLP, Decoder, KVCache
from lowrank.models.families import ModelConfig, Rope
from lowrank.models.generate import generate_ids
from lowrank.models.one_row import one_row
from lowrank.quant import compiled
from lowrank.quant.linear import QuantizedLinear, decoded, quantize_model

CONFIG = ModelConfig("llama", 64, 3, 6, 2, 16, 160, 256, 1e-5, 64, True, rope=Rope(1e4, dim=16, max_positions=64))
PROMPT = [5, 9, 33, 101, 7]
VARIANTS = {
    "llama": CONFIG,
    "biases": replace(CONFIG, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": replace(CONFIG, family="qwen2", qkv_bias=True, tied=False),
    "one key-value head": replace(CONFIG, n_kv_heads=1),
    "no groups": replace(CONFIG, n_kv_heads=6, head_dim=8, rope=Rope(1e4, dim=8), attn_scale=0.3),
    "packed weights": replace(CONFIG, family="phi3"),
    "a window that is wide enough": replace(CONFIG, family="mistral", windows=(None, 64, 64)),
}


def make(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    config = replace(config, windows=config.windows or (None,) * config.n_layers)
    model, draw = Decoder(config), torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() == 2 else 0.5, generator=draw)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def eager_loops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The loops' own Python in place of what a compiler makes of it; the calls, by name."""
    calls: list[str] = []

    def loop(name: str) -> Callable[[list[Tensor]], None]:
        return lambda tensors: (calls.append(name), compiled.SOURCES[name].function(*tensors))[1]

    monkeypatch.setattr(compiled, "loop", loop)
    return calls


@torch.no_grad()
def by_steps(model: Decoder, ids: list[int]) -> Tensor:
    """Logits after each of the ids but the first three, which are read at once.  (T - 3, V)"""
    cache = KVCache(model.config, 1, 64, torch.bfloat16, torch.device("cpu"))
    with decoded(model), one_row(model, 1, 64) as steps:
        model.hidden(torch.tensor([ids[:3]]), cache=cache)
        assert steps is not None
        return torch.cat([steps(cache, id) for id in ids[3:]])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_as_near_to_fp32_as_the_modules(name: str, eager_loops: list[str]) -> None:
    """Both round at the same points; only the order of fp32 sums and the weights of attention differ."""
    model, ids = make(VARIANTS[name]), torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(1))
    got = by_steps(model, ids[0].tolist())
    with torch.no_grad():
        modules = model(ids)[0, 3:]
        exact = model.float()(ids)[0, 3:]
    assert eager_loops.count("head") == 21 and eager_loops.count("layer") == 63
    assert distance(got, exact) < 1.2 * distance(modules, exact) < 0.03
    # Independent roundings: about √2 of either's own distance, were nothing shared
    assert distance(got, modules) < 1.5 * distance(modules, exact)


def test_the_real_model_s_logits(smollm2: tuple[Decoder, Any], eager_loops: list[str]) -> None:
    """30 layers of about ten roundings of 2⁻⁹ each, independent: √300 · 2⁻⁹ = 3.4 % of the logits, by the modules."""
    exact, tokenizer = smollm2
    ids = tokenizer.encode("The history of the village begins with a river")
    model = copy.deepcopy(exact).to(torch.bfloat16)
    got = by_steps(model, ids)
    with torch.no_grad():
        modules, want = (m(torch.tensor([ids]))[0, 3:] for m in (model, exact))
    assert distance(got, want) < 1.2 * distance(modules, want) and distance(modules, want) < 300**0.5 * 2**-9
    clear = want.topk(2).values
    clear = clear[:, 0] - clear[:, 1] > 0.1 * want.std()  # no near-tie
    assert clear.sum() > 2 and torch.equal(got.argmax(-1)[clear], want.argmax(-1)[clear])


def test_generation_takes_it_and_says_the_same(eager_loops: list[str]) -> None:
    """With weights where the likeliest token's logit is 7 % above the next one's, or more."""
    model, draw = make(replace(CONFIG, tied=False)), torch.Generator().manual_seed(31)
    nn.init.normal_(model.model.embed_tokens.weight, generator=draw)
    nn.init.normal_(model.lm_head.weight, generator=draw)
    got = generate_ids(model, [PROMPT], 16)
    assert got == [[125, 236, 75, 114, 239, 161, 239, 161, 239, 161, 239, 161, 239, 161, 239, 161]]
    assert eager_loops.count("head") == 15  # the first token comes from the prompt
    assert generate_ids(model, [PROMPT, PROMPT], 16) == got * 2 and eager_loops.count("head") == 15


@pytest.mark.parametrize("format", ["nf4-dq", "int4"])
def test_a_quantized_model_decodes_its_weights_once(format: str, eager_loops: list[str]) -> None:
    """And gives the logits of its decoded weights; beyond the budget it decodes the plain way."""
    model, ids = make(VARIANTS["packed weights"]), list(range(20))
    quantize_model(model, format, 32)
    got = by_steps(model, ids)
    with decoded(model, budget_bytes=2 * sum(m.out_features * m.in_features for m in quantized(model)) - 1):
        with one_row(model, 1, 64) as steps:
            assert steps is None and all(not m._kept.plain for m in quantized(model))
        assert model.blocks[0].mlp.down_proj._kept.left > 0
    dense = make(VARIANTS["packed weights"])
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            dense.get_submodule(path).weight.copy_(layer.quantized.dequantize(torch.bfloat16))
    assert torch.equal(got, by_steps(dense, ids))


def quantized(model: nn.Module) -> list[QuantizedLinear]:
    return [m for m in model.modules() if isinstance(m, QuantizedLinear)]


class Doubled(nn.Linear):
    """What a researcher might put in."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed(change: Callable[[Decoder], object]) -> nn.Module:
    change(model := make(replace(CONFIG, tied=False)))
    return model


def with_bias(model: Decoder) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(CONFIG.vocab_size, dtype=torch.bfloat16))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a bias on the head": lambda: changed(with_bias),
    "another eps": lambda: changed(lambda m: setattr(m.blocks[0].input_layernorm, "eps", 0.1)),
    "4 bits but q": lambda: changed(lambda m: quantize_model(m, block_size=32, exclude=("lm_head", "q_proj"))),
    "4 bits but gate": lambda: changed(lambda m: quantize_model(m, block_size=32, exclude=("lm_head", "gate_proj"))),
    "a head in 4 bits": lambda: changed(lambda m: quantize_model(m, block_size=32, exclude=())),
    "4 bits in fp32": lambda: changed(lambda m: (quantize_model(m, block_size=32), m.float())),
    "fp32": lambda: make(CONFIG, torch.float32),
    "softcap": lambda: make(replace(CONFIG, attn_softcap=30.0)),
    "softcap of the logits": lambda: make(replace(CONFIG, final_softcap=30.0)),
    "window": lambda: make(replace(CONFIG, windows=(None, 8, None))),
    "gelu": lambda: make(replace(CONFIG, activation="gelu")),
    "half rotated": lambda: make(replace(CONFIG, rope=Rope(1e4, dim=8))),
    "interleaved": lambda: make(replace(CONFIG, rope=Rope(1e4, dim=16, interleaved=True))),
    "stretched by the length": lambda: make(replace(CONFIG, rope=Rope(1e4, "dynamic", 16, max_positions=16))),
    "qwen3": lambda: make(replace(CONFIG, family="qwen3")),
    "gemma2": lambda: make(replace(CONFIG, family="gemma2", activation="gelu_tanh")),
    "gpt2": lambda: make(replace(CONFIG, family="gpt2", n_kv_heads=6, rope=None, activation="gelu_tanh")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_keep_their_modules(name: str, eager_loops: list[str]) -> None:
    model = OTHERS[name]()
    assert len(generate_ids(model, [PROMPT], 4)[0]) == 4 and not {"layer", "head"} & {*eager_loops}


@torch.no_grad()
def test_rows_that_went_before_keep_their_copies(eager_loops: list[str]) -> None:
    quantize_model(model := make(CONFIG), block_size=32)
    with decoded(model):
        generate_ids(model, [PROMPT, PROMPT], 2)
        left = model.blocks[0].mlp.down_proj._kept.left
        generate_ids(model, [PROMPT], 2)
        assert "head" not in eager_loops and model.blocks[0].mlp.down_proj._kept.left == left
    with decoded(model):  # one row after the other: the same dense weights
        generate_ids(model, [PROMPT], 2)
        left = model.blocks[0].mlp.down_proj._kept.left
        generate_ids(model, [PROMPT], 2)
        assert eager_loops.count("head") == 2 and model.blocks[0].mlp.down_proj._kept.left == left


def test_an_edited_model_keeps_its_modules(eager_loops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter, a hook, another class of layer, several rows: each of them, and none of it in the end."""
    model = make(CONFIG)
    lowrank.attach(model, LoRAConfig(rank=4), ["q_proj"])
    generate_ids(model, [PROMPT], 4)
    lowrank.detach(model, "default")
    hook = model.blocks[1].register_forward_hook(lambda *_: None)
    generate_ids(model, [PROMPT], 4)
    hook.remove()
    down = model.blocks[2].mlp.down_proj
    model.blocks[2].mlp.down_proj = Doubled(160, 64, bias=False).bfloat16()
    generate_ids(model, [PROMPT], 4)
    model.blocks[2].mlp.down_proj = down
    down.forward = lambda x: x[..., :64]
    generate_ids(model, [PROMPT], 4)
    del down.forward
    generate_ids(model, [PROMPT, PROMPT], 4)
    generate_ids(model, [PROMPT], 4, samples=2)
    with monkeypatch.context() as patch:
        patch.setattr(MLP, "forward", lambda self, x: x)
        generate_ids(model, [PROMPT], 4)
    assert not {"layer", "head"} & {*eager_loops}
    generate_ids(model, [PROMPT], 4)
    assert {"layer", "head"} <= {*eager_loops}


def test_without_loops_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "loop", lambda name: None)
    with decoded(model := make(CONFIG)), one_row(model, 1, 64) as steps:
        assert steps is None


SWEEP = """
import sys, torch
import lowrank.models.one_row as one_row
from lowrank.quant import compiled
if sys.argv[1] == "build":
    for name in ("decode", "encode"):
        del compiled.SOURCES[name]
    compiled.build()
for name in ("layer", "head"):
    assert compiled.loop(name), "what was compiled differs from its source"
function = compiled.SOURCES["layer"].function
for threads in (1, 2):
    torch.set_num_threads(threads)
    for sizes in ((64, 6, 2, 16, 160, 1), (96, 4, 1, 24, 33, 2), (50, 5, 5, 10, 7, 300), (2048, 32, 8, 64, 5632, 70)):
        want, got = one_row._layer_example(*sizes), one_row._layer_example(*sizes)
        function(*want)
        compiled.loop("layer")(got)
        assert all(map(compiled.close, want, got)), (threads, sizes)
        assert not torch.equal(got[0], one_row._layer_example(*sizes)[0]), "nothing was written"
        assert all(map(torch.equal, want[7:], got[7:])), "a weight was changed"
"""


@pytest.mark.slow
def test_what_is_compiled_does_what_its_source_says(tmp_path: Path) -> None:
    """All sizes are free: one head of keys and values, odd ones, one cached token, a large model; 1 thread and 2."""
    environment = {**os.environ, "LOWRANK_CACHE": str(tmp_path), "LOWRANK_COMPILED": "auto"}
    for how in ("build", "load"):
        done = subprocess.run([sys.executable, "-c", SWEEP, how], env=environment, capture_output=True, text=True)
        if done.returncode and shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("there is no C++ compiler")
        assert done.returncode == 0, done.stderr
