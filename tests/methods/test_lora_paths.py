"""LoRA's quicker ways to its own sum: in place, and by a compiled loop where each row has an adapter of its own."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank.adapter import carried
from lowrank.methods.lora import LoRAConfig
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
    run = {name: source.function for name, source in compiled.SOURCES.items()}
    monkeypatch.setattr(compiled, "loop", lambda name: lambda given: (calls.append(name), run[name](*given)))
    return calls


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
compiled.SOURCES = {"lora_rows": compiled.SOURCES["lora_rows"]}
compiled.build()
run = compiled.loop("lora_rows")
assert run, "what was compiled differs from its source"
for threads in (1, 2):
    torch.set_num_threads(threads)
    for N, R, I, O in ((1, 1, 1, 1), (1, 8, 576, 192), (8, 8, 576, 1536), (3, 5, 33, 7), (40, 64, 2048, 96)):
        y, x = torch.randn(N, O).bfloat16(), torch.randn(N, I).bfloat16()
        A, up = torch.randn(N, R, I) / I**0.5, torch.randn(N, R, O)
        want, got, others = y.clone(), y.clone(), [t.clone() for t in (x, A, up)]
        lora_paths.add_rows(want, x, A, up)
        run([got, x, A, up])
        assert lora_paths._close(want, got), (threads, N, R, I, O)
        assert not torch.equal(got, y), "nothing was written"
        assert all(map(torch.equal, others, (x, A, up))), "an input was changed"
"""


@pytest.mark.slow
def test_what_is_compiled_does_what_its_source_says(tmp_path: Path) -> None:
    environment = {**os.environ, "LOWRANK_CACHE": str(tmp_path), "LOWRANK_COMPILED": "auto"}
    done = subprocess.run([sys.executable, "-c", SWEEP], env=environment, capture_output=True, text=True)
    if done.returncode and "ompiler" in done.stderr:
        pytest.skip("no C++ compiler here")
    assert done.returncode == 0, done.stderr
