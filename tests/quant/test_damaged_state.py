"""A damaged state dict is a ValueError that names the key, whatever is wrong with it: 10,000 damaged ones."""

import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank.quant.tensor import QuantizedTensor

LAYOUTS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int4", "int4-affine")
NUMBERS = (-1, 0, 1, 7, 63, 64.5, 2**31, 2**63, 2**70, 10**400, -0.0, 1e400, float("nan"), True, None)
OTHERS = (
    "",
    "nf4",
    "float64",
    "float32",
    [],
    [1],
    [[4, 64]],
    {"a": 1},
    [4, -64],
    [2**40, 2**40],
    [1] * 50,
    "\x00",
    [True, 64],
)
DTYPES = (torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool)


def damage(state: dict[str, Any], key: str, chance: random.Random) -> str:
    """Change one thing in place; what was done."""
    tensor = state[key]
    is_json = key.endswith(".meta") or ".quant_state." in key
    kind = chance.choice(
        ("json", "json", "json") if is_json else ("drop", "rename", "length", "dtype", "shape", "value", "type")
    )
    if kind == "json":
        return f"{key}: {damage_json(state, key, chance)}"
    if kind == "drop":
        del state[key]
    elif kind == "rename":
        state[key + chance.choice(("x", ".", "_"))] = state.pop(key)
    elif kind == "length":
        flat = tensor.reshape(-1)
        n = chance.choice((0, 1, flat.numel() - 1, flat.numel() + 1, 3 * flat.numel()))
        state[key] = flat.repeat(4)[: max(n, 0)] if flat.numel() else torch.zeros(3, dtype=tensor.dtype)
    elif kind == "dtype":
        state[key] = tensor.to(chance.choice(DTYPES))
    elif kind == "shape":
        state[key] = chance.choice((tensor.reshape(-1, 1, 1), tensor.reshape(1, -1), tensor[None], torch.empty(0, 3)))
    elif kind == "value" and tensor.is_floating_point() and tensor.numel():
        state[key] = tensor.clone()
        state[key].view(-1)[chance.randrange(tensor.numel())] = chance.choice((float("nan"), float("inf"), -1e30, 0.5))
    else:
        state[key] = chance.choice((None, 3, "text", b"bytes", [1, 2], object(), tensor.tolist()))
    return f"{key}: {kind}"


def damage_json(state: dict[str, Any], key: str, chance: random.Random) -> str:
    raw = bytes(state[key].tolist())
    meta = json.loads(raw)
    kind = chance.choice(("field", "field", "field", "drop", "bytes", "cut", "top", "tensor"))
    if kind == "field":
        name = chance.choice(sorted(meta))
        meta[name] = chance.choice((*NUMBERS, *OTHERS))
        raw = json.dumps(meta).encode()
        kind = f"{name} = {meta[name]!r:.60}"
    elif kind == "drop":
        del meta[chance.choice(sorted(meta))]
        raw = json.dumps(meta).encode()
    elif kind == "bytes":
        broken = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        raw = bytes(broken)
    elif kind == "cut":
        raw = raw[: chance.randrange(len(raw))]
    elif kind == "top":
        raw = chance.choice((b"[]", b"3", b"null", b'"nf4"', b"[" * 5000, b"{}", b"\xff\xfe", b'{"a":' * 3000))
    else:
        state[key] = chance.choice(
            (torch.zeros(3), torch.tensor(5, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8))
        )
        return kind
    state[key] = torch.tensor(list(raw), dtype=torch.uint8)
    return kind


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_a_value_error_or_harmless(layout: str) -> None:
    chance = random.Random(layout)
    q = QuantizedTensor.quantize(torch.randn(6, 70), layout, 32)
    refused = 0
    for _ in range(10_000 // len(LAYOUTS) + 1):
        state: dict[str, Any] = dict(q.state_dict("a.weight"))
        done = [damage(state, key, chance) for key in chance.sample(sorted(state), chance.randint(1, 2))]
        try:
            read = QuantizedTensor.from_state_dict(state, "a.weight")
        except ValueError as error:
            refused += 1
            assert "a.weight" in str(error), (done, error)
            continue
        except Exception as error:
            raise AssertionError(f"{done} gave {type(error).__name__}: {error}") from error
        assert read.dequantize().shape == read.shape, done  # what is accepted can be decoded
    assert refused > 1000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_missing_key_is_named(layout: str) -> None:
    state = QuantizedTensor.quantize(torch.randn(6, 70), layout, 32).state_dict("a.weight")
    for key in state:
        rest: dict[str, Tensor] = {k: v for k, v in state.items() if k != key}
        with pytest.raises(ValueError) as caught:
            QuantizedTensor.from_state_dict(rest, "a.weight")
        assert key.replace("quant_state.bitsandbytes__fp4", "quant_state.bitsandbytes__nf4") in str(caught.value)


@pytest.mark.parametrize("key", ["a.weight.quant_map", "a.weight.nested_quant_map"])
def test_another_table_is_refused(key: str) -> None:
    """Kernels have the tables built in: accepting another one would decode to something else without a word."""
    state = QuantizedTensor.quantize(torch.randn(6, 70), "nf4-dq", 32).state_dict("a.weight")
    state[key][3] += 1e-3
    with pytest.raises(ValueError, match=rf"{key} is not the table of"):
        QuantizedTensor.from_state_dict(state, "a.weight")


def test_a_length_that_does_not_fit_the_shape_is_named() -> None:
    state = QuantizedTensor.quantize(torch.randn(6, 70), "nf4", 32).state_dict("a.weight")
    state["a.weight"] = state["a.weight"][:-1]
    with pytest.raises(ValueError, match=r"a\.weight must be \(210,\) of torch.uint8, got \(209,\)"):
        QuantizedTensor.from_state_dict(state, "a.weight")


def test_a_shape_whose_product_overflows_is_refused() -> None:
    state = QuantizedTensor.quantize(torch.randn(6, 70), "int8", 32).state_dict("a.weight")
    text = bytes(state["a.weight.meta"].tolist()).decode().replace("[6, 70]", "[4294967296, 4294967296]")
    state["a.weight.meta"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"a\.weight: shape \(4294967296, 4294967296\)"):
        QuantizedTensor.from_state_dict(state, "a.weight")
