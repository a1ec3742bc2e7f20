"""Every architecture against the reference implementation: logits, padding, loss, gradients, greedy tokens."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lowrank.models.families import FAMILIES, config_from_json
from lowrank.models.generate import generate_ids
from lowrank.models.load import load

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
DECODERS = sorted(p.parent.name for p in MODELS.glob("*/meta.json") if not p.parent.name.startswith("bert"))
TOLERANCE = 5e-5  # the reference's own fp32 and fp64 results differ by up to 1.1e-5


@pytest.fixture(scope="module", params=DECODERS)
def case(request):
    folder = MODELS / request.param
    model, _ = load(folder, dtype=torch.float32, device="cpu", progress=False)
    return (
        request.param,
        model,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "expected.safetensors"),
        json.loads((folder / "meta.json").read_text()),
    )


def test_every_family_has_a_reference() -> None:
    proved = {config_from_json(json.loads((MODELS / name / "config.json").read_text())).family for name in DECODERS}
    assert proved >= {name for name, family in FAMILIES.items() if not family.encoder}


@pytest.mark.parametrize("batch", ["plain", "one_token", "right_pad", "left_pad", "left_pad_pos"])
def test_logits(case, batch: str) -> None:
    name, model, inputs, expected, _ = case
    if f"{batch}.logits" not in expected:
        pytest.skip(f"{name} has no batch {batch}")
    mask = inputs.get(f"{batch}.attention_mask")
    with torch.no_grad():
        got = model(inputs[f"{batch}.input_ids"], mask, inputs.get(f"{batch}.position_ids"))
    wanted = expected[f"{batch}.logits"]
    assert got.shape == wanted.shape and got.isfinite().all()
    if mask is not None:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


def test_loss_and_gradients(case) -> None:
    _, model, inputs, expected, meta = case
    logits = model(inputs["right_pad.input_ids"], inputs["right_pad.attention_mask"])
    labels = inputs["loss.labels"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected["loss.value"].reshape(()), atol=1e-5, rtol=0)
    model.zero_grad()
    loss.backward()
    norms = {path: p.grad.norm().item() for path, p in model.named_parameters()}
    assert norms == pytest.approx(meta["grad_l2"], rel=1e-4, abs=1e-6)


def test_greedy_tokens(case) -> None:
    _, model, inputs, expected, _ = case
    prompts, wanted = (
        inputs["greedy.input_ids"],
        expected["greedy.output_ids"][:, inputs["greedy.input_ids"].shape[1] :],
    )
    assert generate_ids(model, prompts.tolist(), wanted.shape[1]) == wanted.tolist()


def test_greedy_tokens_of_a_left_padded_batch(case) -> None:
    name, model, inputs, expected, _ = case
    if "greedy_left_pad.output_ids" not in expected:
        pytest.skip(f"{name} has no left-padded continuation")
    ids, mask = inputs["left_pad.input_ids"], inputs["left_pad.attention_mask"].bool()
    prompts = [row[real].tolist() for row, real in zip(ids, mask)]
    wanted = expected["greedy_left_pad.output_ids"][:, ids.shape[1] :]
    assert generate_ids(model, prompts, wanted.shape[1]) == wanted.tolist()


@pytest.mark.parametrize("name", [name for name in DECODERS if (MODELS / name / "config_transformers5.json").is_file()])
def test_both_spellings_of_a_configuration_mean_the_same(name: str) -> None:
    old, new = (json.loads((MODELS / name / f"config{s}.json").read_text()) for s in ("", "_transformers5"))
    assert config_from_json(old) == config_from_json(new)


@pytest.mark.parametrize("name", DECODERS)
def test_quantized_forward_is_close(name: str) -> None:
    model, _ = load(MODELS / name, quantize="int8", dtype=torch.float32, device="cpu", progress=False)
    inputs, expected = (load_file(MODELS / name / f"{part}.safetensors") for part in ("inputs", "expected"))
    with torch.no_grad():
        error = (model(inputs["plain.input_ids"][:1]) - expected["plain.logits"]).abs().mean()
    assert error < 0.05 * expected["plain.logits"].std()  # 8 bits: a wrong layout would be off by 1.4 times the spread
