"""The theorems of the conformance suite: what every adapter method must be, and what it states of itself.

Each one takes a method, gives its parameters random values (the initial ones are a no-op and would prove nothing) and
raises AssertionError where the method is not what it should be. Sums are compared in fp64, so that a tolerance of
1e-8 of the output's size separates a wrong equation from rounding.
"""

import tempfile
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.active import acting, rows
from lowrank.adapter import AdaptedLinear, Adapter, adapted_layers, dense_weight
from lowrank.filling import adapter_state
from lowrank.hosts import SHAPES, Host, close, give, given, host, only, randomise, settings, theorem
from lowrank.merging import merge, unmerge
from lowrank.store import load_adapter, save_adapter
from lowrank.targets import detach


@theorem("configuration is a frozen dataclass with defaults")
def _configuration(method: type[Adapter]) -> None:
    config = method.Config
    assert is_dataclass(config) and config.__dataclass_params__.frozen, f"{config.__name__} is no frozen dataclass"  # type: ignore[attr-defined]
    settings(method)
    if "rank" in {f.name for f in fields(config)}:
        try:
            config(rank=0)  # type: ignore[call-arg]
        except ValueError:
            return
        raise AssertionError(f"{config.__name__}(rank=0) must be a ValueError")


@theorem("identity_at_init is honest")
def _identity(method: type[Adapter]) -> None:
    only(method.place in ("linear", "sublayer"), "the method adds tokens")
    tolerance = 1e-5 if method.edits_base else 0.0  # a method that edits the base rounds it once more
    shapes = SHAPES if method.place == "linear" else SHAPES[:1]
    hosts = given(method, ("dense", "nf4"), shapes, random=False)
    same = all(torch.allclose(model(x), y, atol=tolerance, rtol=0) for _, model, x, y in hosts)
    assert same == method.identity_at_init, f"it states {method.identity_at_init}, the output says {same}"


def _merge_agrees(method: type[Adapter], shapes: tuple[tuple[int, int], ...], bias: bool, kind: str) -> None:
    only(method.place == "linear" and method.mergeable, "not mergeable")
    for what, model, x, _ in given(method, (kind,), shapes, bias):
        if kind == "dense":
            model, x = model.double(), x.double()
        # fp32 on a quantized base: about I = 40 products of size 1e1 at 6e-8 each; an edited base is stored in fp32
        tolerance = 1e-4 if kind == "nf4" else 1e-6 if method.edits_base else 1e-8
        close(merged_layer(model, x.dtype)(x), model(x), what, tolerance)


def merged_layer(model: Host, dtype: torch.dtype) -> nn.Linear:
    """The dense layer by the method's own merge, in `dtype` throughout."""
    layer = model.layer
    assert isinstance(layer, AdaptedLinear)
    weight, bias = dense_weight(layer.base), layer.base.bias
    adapter = next(iter(layer.adapters.values()))
    before = weight.clone()
    try:
        w, b = adapter.merge(weight.to(dtype), None if bias is None else bias.detach().to(dtype))  # type: ignore[operator, union-attr]
    except NotImplementedError as error:
        raise AssertionError("it states mergeable = True and has no merge") from error
    assert torch.equal(weight, before), "merge changed the weight it was given, in place"
    assert w.shape == weight.shape, f"merge gives a weight of shape {tuple(w.shape)}, wanted {tuple(weight.shape)}"
    merged = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, dtype=dtype)
    with torch.no_grad():
        merged.weight.copy_(w)
        if b is not None:
            merged.bias.copy_(b)
    return merged


theorem("merge == forward, square and not")(partial(_merge_agrees, shapes=SHAPES, bias=False, kind="dense"))
theorem("merge == forward with a bias")(partial(_merge_agrees, shapes=SHAPES[:1], bias=True, kind="dense"))
theorem("merge == forward on an NF4 base")(partial(_merge_agrees, shapes=SHAPES[:2], bias=True, kind="nf4"))


@theorem("an embedding and a Conv1D are linear layers too")
def _merge_transposed(method: type[Adapter]) -> None:
    only(method.place == "linear" and method.mergeable, "not mergeable")
    for what, model, x, _ in given(method, ("conv1d", "embedding")):
        y = model(x)
        merge(model, "a")
        close(model(x), y, what, 1e-5)  # fp32: about I = 24 products of size 1e1 at 6e-8 each


@theorem("a method that is not mergeable is refused by merge")
def _refused(method: type[Adapter]) -> None:
    only(not method.mergeable, "mergeable")
    model, _ = host(method)
    give(model, method)
    try:
        merge(model, "a")
    except ValueError:
        return
    raise AssertionError("merge accepted it")


@theorem("merge, then unmerge, is the base bit for bit")
def _unmerge(method: type[Adapter]) -> None:
    only(method.place == "linear" and method.mergeable, "not mergeable")
    for what, model, x, _ in given(method, ("dense", "nf4")):
        y, old = model(x), _bits(model)
        merge(model, "a")
        unmerge(model)
        assert torch.equal(model(x), y) and _same(old, _bits(model)), f"{what}: something stayed behind"


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict(keep_vars=True).items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@theorem("the base is never changed, and detach brings it back")
def _detach(method: type[Adapter]) -> None:
    for what, model, x, y in given(method, ("dense", "nf4") if method.place == "linear" else ("dense",)):
        base = model.layer.base
        old = _bits(base)  # type: ignore[arg-type]
        model.train()
        model(x).float().square().sum().backward()
        _step(model)
        model.eval()
        if method.mergeable and method.place == "linear":
            merge(model, "a", force=True)
            unmerge(model)
        detach(model, "a")
        assert model.layer is base, "detach leaves another layer behind"
        assert _same(old, _bits(base)), f"{what}: its parameters changed"  # type: ignore[arg-type]
        assert torch.equal(model(x), y), f"{what}: its output changed"


def _step(model: nn.Module) -> None:
    for _, layer in adapted_layers(model):
        for adapter in layer.adapters.values():
            adapter.after_step(0, 10)  # type: ignore[operator]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(0.01 * p.grad)
                p.grad = None


@theorem("save and load bring back each tensor's bytes and the output")
def _store(method: type[Adapter]) -> None:
    model, x = host(method)
    give(model, method, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, "a")
        other, _ = host(method)
        other.load_state_dict({f"layer.{k}": v for k, v in model.layer.base.state_dict().items()})  # type: ignore[union-attr]
        torch.manual_seed(99)  # nothing may depend on the random state
        load_adapter(other, folder, "a")
    other.eval()
    assert _same(adapter_state(model, "a"), adapter_state(other, "a")), "the tensors differ"
    assert torch.equal(model(x), other(x)), "the tensors agree and the output does not: some state is not saved"


@theorem("parameters are fp32 and the output has the base's dtype")
def _dtype(method: type[Adapter]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, x = host(method)
        model.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        before = model(x).dtype
        adapter = give(model, method)
        for name, p in adapter.named_parameters():
            assert p.dtype == torch.float32, f"{name} is {p.dtype} on a {dtype} base"
        y = model(x)
        assert y.dtype == before, f"the output is {y.dtype} on a {dtype} base"
        assert y.isfinite().all(), f"not finite in {dtype}"


@theorem("every trainable parameter gets a gradient")
def _gradient(method: type[Adapter]) -> None:
    model, x = host(method)
    adapter = give(model, method)
    assert any(p.requires_grad for p in adapter.parameters()), "it has no trainable parameter"
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if ".adapters." in name and p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f"{name} gets no gradient"
        else:
            assert p.grad is None, f"{name} is frozen and got a gradient"


@theorem("the gradient is the slope of the output")
def _slope(method: type[Adapter]) -> None:
    model, x = host(method)
    model.double()
    give(model, method)
    model.double()
    leaves: list[Tensor] = []
    if x.is_floating_point():
        x = x.double()
        leaves = [x.requires_grad_()] if method.place in ("linear", "sublayer") else []
    if method.exact_gradient:
        leaves += [p for p in model.parameters() if p.requires_grad]
    only(bool(leaves), "nothing to differentiate")
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(model(x).shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((model(x) * direction).sum(), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        step = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for h in (1e-5, -2e-5):
                leaf += h * step
                ends.append(float((model(x) * direction).sum()))
            leaf += 1e-5 * step
        slope = (ends[0] - ends[1]) / 2e-5
        got = 0.0 if gradient is None else float((gradient * step).sum())
        # central differences: curvature leaves about 1e-10, rounding 1e-16 / 1e-5 of the output
        assert abs(got - slope) <= 1e-5 * max(abs(slope), 1.0), f"gradient {got:.6g}, slope {slope:.6g}"


@theorem("activation checkpointing gives the same gradients")
def _checkpointing(method: type[Adapter]) -> None:
    gradients = []
    for recompute in (False, True):
        model, x = host(method)
        give(model, method)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert _same(*gradients), "they differ"


@theorem("the same seed gives the same adapter")
def _seed(method: type[Adapter]) -> None:
    states = []
    for _ in range(2):
        model, _ = host(method)
        states.append(_bits(give(model, method, seed=3, random=False)))
    assert _same(*states), "two adapters of one seed differ"


@theorem("the output depends on nothing but the input")
def _pure(method: type[Adapter]) -> None:
    model, x = host(method)
    give(model, method)
    y = model(x)
    assert torch.equal(model(x), y), "a second forward in eval mode differs"
    close(torch.cat([model(x[:1]), model(x[1:])]), y, "rows one by one", 1e-5)
    if method.place == "linear":
        close(model(x.flatten(0, 1)), y.flatten(0, 1), "(N, I) instead of (B, T, I)", 1e-5)
        close(model(x.mT.contiguous().mT), y, "non-contiguous input", 1e-5)


@theorem("two adapters share no trainable tensor and no state")
def _shared(method: type[Adapter]) -> None:
    model, x = host(method)
    first = give(model, method, "a", seed=1)
    y = model(x)
    second = give(model, method, "b", seed=2)
    mine = {p.untyped_storage().data_ptr() for p in first.parameters()}
    assert not any(p.untyped_storage().data_ptr() in mine for p in second.parameters()), "they share a tensor"
    randomise(second, 9)
    second(x, model.layer.base(x), model.layer.base) if method.place == "linear" and method.needs_y else model(x)  # type: ignore[operator, union-attr]
    with acting(model, "a"):
        assert torch.equal(model(x), y), "the first adapter's output changed with the second one's parameters"


@theorem("all tensors are parameters or buffers")
def _registered_state(method: type[Adapter]) -> None:
    model, x = host(method)
    adapter = give(model, method)
    model(x)
    loose = [name for module in adapter.modules() for name, value in vars(module).items() if isinstance(value, Tensor)]
    assert not loose, f"{', '.join(loose)} would stay behind on .to(device)"


@theorem("several adapters act as y + sum of w (f - y), and merge so")
def _several(method: type[Adapter]) -> None:
    only(method.place in ("linear", "sublayer"), "the method adds tokens")
    model, x = host(method)
    give(model, method, "a", seed=1)
    give(model, method, "b", seed=2)
    model, x = model.double(), x.double()
    f = {}
    for name in ("a", "b", None):
        with acting(model, name):
            f[name] = model(x)
    with acting(model, {"a": 0.7, "b": -0.3}):
        y = model(x)
    close(y, f[None] + 0.7 * (f["a"] - f[None]) - 0.3 * (f["b"] - f[None]), "0.7 a - 0.3 b")


@theorem("rows of a batch run as if alone")
def _rows(method: type[Adapter]) -> None:
    model, x = host(method)
    give(model, method, "a", seed=1)
    give(model, method, "b", seed=2)
    batches: list[list[Any]] = [["a", "b"]]
    if method.place in ("linear", "sublayer"):
        batches += [["a", None, {"b": 0.5}, "a"], ["b", None, {"a": 0.5, "b": 2.0}, "a"]]
    for choices in batches:
        x = torch.cat([x, x.flip(0)])[: len(choices)]
        with rows(model, choices):
            y = model(x)
        for i, choice in enumerate(choices):
            with acting(model, choice):
                close(y[i : i + 1], model(x[i : i + 1]), f"row {i} ({choice})", 1e-5)


@theorem("fused == forward")
def _fused(method: type[Adapter]) -> None:
    ran = False
    for gradients, dtype in product((True, False), (torch.float32, torch.bfloat16)):
        model, x = host(method)
        model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
        adapter = give(model, method)
        only(adapter.may("fused"), "no fused path, or forward is another class's")
        base = model.layer.base  # type: ignore[union-attr]
        with torch.set_grad_enabled(gradients):
            fused = adapter.fused(x, base)  # type: ignore[arg-type]
        if fused is not None:
            ran = True
            want, tolerance = adapter(x, base(x), base).float(), 1e-5 if dtype == torch.float32 else 0.03  # type: ignore[operator]
            close(fused.float(), want, f"{dtype}{'' if gradients else ' without gradients'}", tolerance)
    only(ran, "fused applies to none of the cases here")


@theorem("the hooks keep their promises")
def _hooks(method: type[Adapter]) -> None:
    model, x = host(method)
    adapter = give(model, method)
    model.train()
    groups = adapter.param_groups(0.5)
    listed = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in adapter.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trainable), "param_groups must hold each trainable parameter once"
    assert all(group.get("lr", 0) > 0 for group in groups), "each group of param_groups needs a rate"
    penalty = adapter.penalty()
    if penalty is not None:
        assert penalty.dim() == 0 and penalty.isfinite(), "penalty must be a finite scalar"
        penalty.backward()
    shapes = {name: p.shape for name, p in adapter.named_parameters()}
    for step in range(4):
        model(x).square().sum().backward()
        adapter.after_step(step, 4)
        assert {name: p.shape for name, p in adapter.named_parameters()} == shapes, "after_step changed a shape"
        assert all(p.isfinite().all() for p in adapter.parameters()), "after_step left a value that is not finite"
