"""LoRA's quicker ways to its own sum: in place, and by compiled loops, of one adapter and of an adapter a row."""

import copy
import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank.adapter import Adapter, carried
from lowrank.methods.lora import LoRA, LoRAConfig
from lowrank.quant import compiled

ROWS = ["a", None, {"b": 0.5}, "b"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24)).bfloat16()
    for name, rank in (("a", 2), ("b", 3)):
        lowrank.attach(model, LoRAConfig(rank=rank), ["0", "1"], name=name)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(len(key)))
    return model.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The loops' own Python in place of what a compiler makes of it; the calls, by name."""
    calls: list[str] = []

    def loop(name: str) -> object:
        source = compiled.SOURCES[name]

        def run(given: list[torch.Tensor]) -> None:
            assert [t.dtype for t in given] == [t.dtype for t in source.example()]  # a compiled loop asks nothing
            calls.append(name)
            source.function(*given)

        return run

    monkeypatch.setattr(compiled, "loop", loop)
    return calls


@pytest.mark.usefixtures("calls")
def test_forty_rows_of_one_token_take_the_loop(model: nn.Module) -> None:
    x, rows = torch.randn(40, 1, 24).bfloat16(), ["a", "b"] * 20
    with torch.no_grad(), lowrank.rows(model, rows):
        got = model(x)
    with torch.no_grad(), lowrank.rows(model.float(), rows):
        want = model(x.float())
    assert (got.float() - want).norm() <= 2**-7 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_tokens_in_place_are_forward(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).to(dtype)
    adapter = LoRA(LoRAConfig(rank=4), layer)
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(2, 40, 24).to(dtype)
    with torch.no_grad():
        got, want = adapter.fused(x, layer), adapter(x, layer(x), layer)
    assert got is not None and got.dtype == dtype
    # bf16 rounds A, B and x Aᵀ too: four roundings where forward has two
    limit = 2**-7 if dtype == torch.bfloat16 else 2**-20
    assert (got - want).float().norm() <= limit * want.float().norm()


def test_a_changed_dropout_or_factor_is_never_bypassed() -> None:
    class Halved(LoRA):
        def dropped(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x

    class WithModule(Adapter):
        Config = LoRAConfig

        def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
            super().__init__(config, base)
            self.dropout = nn.Dropout(config.dropout)

        def forward(self, x: torch.Tensor, y: torch.Tensor, base: nn.Module) -> torch.Tensor:
            return y + self.dropout(x).sum()

    class FrozenA(LoRA):
        def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
            super().__init__(config, base)
            A = self.lora_A.detach()
            del self.lora_A
            self.register_buffer("lora_A", A)

    assert not any(Halved.may(path) for path in ("fused", "projected", "grouped")) and FrozenA.may("fused")
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    with torch.no_grad():
        assert torch.isfinite(WithModule(LoRAConfig(), layer)(x, layer(x), layer)).all()
        assert FrozenA(LoRAConfig(rank=2), layer).fused(x, layer) is not None


def test_an_output_that_its_layer_keeps_is_not_written_over() -> None:
    class Keeps(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = super().forward(x)
            return self.last

    base = Keeps(24, 24)
    adapter = LoRA(LoRAConfig(rank=2), base)
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(2, 24)
    with torch.no_grad():
        adapter.fused(x, base)
        assert torch.equal(base.last, nn.functional.linear(x, base.weight, base.bias))


def test_a_base_whose_weight_is_no_parameter_is_used_as_it_is() -> None:
    base, x = nn.Linear(24, 24), torch.randn(2, 24)
    adapter, weight = LoRA(LoRAConfig(rank=2), base), base.weight.detach()
    del base.weight
    base.register_buffer("weight", weight)
    with torch.no_grad():
        got = adapter.fused(x, base)
    assert got is not None and torch.equal(got, nn.functional.linear(x, weight, base.bias))  # B is 0


@pytest.mark.parametrize("shape", [(4, 1, 24), (4, 24)])
def test_one_token_a_row_goes_through_the_loop(model: nn.Module, calls: list[str], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).bfloat16()
    with lowrank.rows(model, ROWS):
        model(x)
        assert not calls  # gradients are taken
        with torch.no_grad():
            got = model(x)
    assert calls == ["lora_rows"] * 2
    with lowrank.rows(model.float(), ROWS):
        want = model(x.float())
    # bf16 rounds the first layer's output and the second's, each value by 2⁻⁹ of itself at most
    assert (got.float() - want).norm() <= 2**-7 * want.norm()


@pytest.mark.parametrize("shape", [(1, 1, 24), (4, 1, 24), (2, 16, 24)])
def test_few_tokens_of_one_adapter_go_through_its_loop(
    model: nn.Module, calls: list[str], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape).bfloat16()
    lowrank.activate(model, "b")
    model(x)
    assert not calls  # gradients are taken
    with torch.no_grad():
        got = model(x)
        assert calls == ["lora_short"] * 2
        model(torch.randn(100, 1, 24).bfloat16())
        model(x[0])
        want = model.float()(x.float())
    assert calls == ["lora_short"] * 2  # not of 300 tokens x rank, nor of two dimensions, nor in fp32
    assert (got.float() - want).norm() <= 2**-7 * want.norm()  # as below


def test_more_tokens_and_fp32_do_not(model: nn.Module, calls: list[str]) -> None:
    with torch.no_grad(), lowrank.rows(model, ROWS):
        model(torch.randn(4, 2, 24).bfloat16())
        model.float()(torch.randn(4, 1, 24))
    assert not calls


@pytest.mark.parametrize("choice", ["a", ROWS])
def test_what_a_hook_kept_is_not_written_over(model: nn.Module, choice: object) -> None:
    kept: list[torch.Tensor] = []
    base, x = model[0].base, torch.randn(4, 1, 24).bfloat16()
    base.register_forward_hook(lambda module, args, y: kept.append(y))
    with torch.no_grad(), lowrank.rows(model, choice if isinstance(choice, list) else [choice] * 4):
        model(x)
        model(x)
    assert torch.equal(kept[0], nn.functional.linear(x, base.weight, base.bias)) and torch.equal(*kept)


def test_the_path_follows_what_acts_and_what_is_attached(model: nn.Module) -> None:
    """A layer looks its way up once for each choice; nothing may be left of the choice before."""
    x, outputs = torch.randn(4, 1, 24).bfloat16(), {}
    with torch.no_grad():
        for name in ("a", "b", None):
            lowrank.activate(model, name)
            outputs[name] = model(x)
        lowrank.activate(model, "a")
        assert torch.equal(model(x), outputs["a"])
        model[0].adapters["a"].lora_B = nn.Parameter(torch.zeros(40, 2))  # another parameter counts at once
        model[1].adapters["a"].lora_B.data = torch.zeros(24, 2)
        assert torch.equal(model(x), outputs[None])
        lowrank.detach(model, "a")
        lowrank.activate(model, "b")
        assert torch.equal(model(x), outputs["b"])


def test_a_used_layer_copies_and_leaves_nothing_behind(model: nn.Module) -> None:
    x = torch.randn(4, 1, 24).bfloat16()
    with torch.no_grad(), lowrank.rows(model, ROWS):
        model(x)
        chosen = weakref.ref(carried(model).selection.now.rows)
    assert chosen() is None  # and with it the stacked factors
    with torch.no_grad():
        lowrank.activate(model, "a")
        y = model(x)
        other = copy.deepcopy(model)
        for p in other.parameters():
            p.zero_()
        assert torch.equal(model(x), y) and not other(x).any()
    gone = weakref.ref(model[0].base)
    gc.disable()
    try:
        del model[0]
        assert gone() is None  # no cycle keeps a layer's weights
    finally:
        gc.enable()


SWEEP = """
import torch
from lowrank.methods import lora_paths
from lowrank.quant import compiled
compiled.SOURCES = {name: compiled.SOURCES[name] for name in ("lora_rows", "lora_short")}
compiled.build()
for name, source in compiled.SOURCES.items():
    run = compiled.loop(name)
    assert run, "what was compiled differs from its source"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for N, T, R, I, O in (
            (1, 1, 1, 1, 1), (1, 1, 8, 576, 192), (8, 1, 8, 576, 1536), (3, 2, 5, 33, 7), (40, 1, 64, 2048, 96)
        ):
            y, x = torch.randn(N, T, O).bfloat16(), torch.randn(N, T, I).bfloat16()
            A, up = torch.randn(N, R, I) / I**0.5, torch.randn(N, R, O)
            given = [x, A.bfloat16(), up.bfloat16()]
            if name == "lora_short":
                given = [x, A[0].contiguous(), up[0].T.contiguous(), torch.tensor(0.7)]
            want, got, others = y.clone(), y.clone(), [t.clone() for t in given]
            source.function(want, *given)
            run([got, *given])
            assert compiled.close(want, got), (name, threads, N, T, R, I, O)
            assert O == 1 or not torch.equal(got, y), "nothing was written"  # one update may be less than half an ulp
            assert all(map(torch.equal, others, given)), "an input was changed"
"""


@pytest.mark.slow
def test_what_is_compiled_does_what_its_source_says(tmp_path: Path) -> None:
    environment = {**os.environ, "LOWRANK_CACHE": str(tmp_path), "LOWRANK_COMPILED": "auto"}
    done = subprocess.run([sys.executable, "-c", SWEEP], env=environment, capture_output=True, text=True)
    if done.returncode and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler here")
    assert done.returncode == 0, done.stderr
