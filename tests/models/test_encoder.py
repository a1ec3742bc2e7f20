"""BERT against the reference implementation, and its heads."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.errors import ConfigError
from lowrank.methods.lora import LoRAConfig
from lowrank.models.families import config_from_json
from lowrank.models.generate import generate_ids
from lowrank.models.load import load

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
NAMES = ("bert_mlm", "bert_token_cls")


@pytest.fixture(params=NAMES)
def case(request):
    folder = MODELS / request.param
    model, _ = load(folder, dtype=torch.float32, device="cpu", progress=False)
    return model, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors"), folder


@pytest.mark.parametrize("batch", ["plain", "one_token", "right_pad", "token_types"])
def test_logits(case, batch: str) -> None:
    model, inputs, expected, _ = case
    mask = inputs.get(f"{batch}.attention_mask")
    with torch.no_grad():
        got = model(inputs[f"{batch}.input_ids"], mask, token_type_ids=inputs.get(f"{batch}.token_type_ids"))
    wanted = expected[f"{batch}.logits"]
    if mask is not None:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=0)


def test_loss_and_gradients(case) -> None:
    model, inputs, expected, folder = case
    logits = model(inputs["right_pad.input_ids"], inputs["right_pad.attention_mask"])
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["loss.labels"].flatten())
    torch.testing.assert_close(loss, expected["loss.value"].reshape(()), atol=1e-5, rtol=0)
    loss.backward()
    norms = {path: p.grad.norm().item() for path, p in model.named_parameters()}
    wanted = json.loads((folder / "meta.json").read_text())["grad_l2"]
    assert norms == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings(name: str) -> None:
    old, new = (json.loads((MODELS / name / f"config{s}.json").read_text()) for s in ("", "_transformers5"))
    assert config_from_json(old) == config_from_json(new)


def test_labels_of_the_configuration() -> None:
    config = config_from_json(json.loads((MODELS / "bert_token_cls" / "config.json").read_text()))
    assert config.head == "tokens" and config.labels[:2] == ("O", "B-PER") and len(config.labels) == 9


@pytest.mark.parametrize(
    ("change", "head", "shape"),
    [
        ({"architectures": ["BertModel"]}, "embed", (2, 5, 64)),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
            "sequence",
            (2, 3),
        ),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}}, "regression", (2, 1)),
    ],
)
def test_other_heads(copied, change: dict, head: str, shape: tuple[int, ...]) -> None:
    file = copied("bert_token_cls") / "model.safetensors"
    raw = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps({**raw, **change}))
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("classifier")}
    if head != "embed":
        tensors |= {"bert.pooler.dense.weight": torch.randn(64, 64), "bert.pooler.dense.bias": torch.randn(64)}
        tensors |= {"classifier.weight": torch.randn(shape[1], 64), "classifier.bias": torch.randn(shape[1])}
    save_file(tensors, file)
    model, _ = load(file.parent, dtype=torch.float32, progress=False)
    assert model.config.head == head and model(torch.arange(10).view(2, 5)).shape == shape


def test_names_as_tensorflow_had_them_and_a_bare_body(copied) -> None:
    file = copied("bert_mlm") / "model.safetensors"
    raw = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps({**raw, "architectures": ["BertModel"]}))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, value in load_file(file).items():
        for new, older in old.items():
            name = name.replace(new, older)
        tensors[name.removeprefix("bert.")] = value
    save_file(tensors, file)
    model, whole = load(file.parent, progress=False)[0], load(MODELS / "bert_mlm", progress=False)[0]
    ids = torch.arange(10).view(2, 5)
    assert torch.equal(model(ids), whole.hidden(ids))


def test_rows_of_padding_alone_give_no_nan() -> None:
    model, _ = load(MODELS / "bert_token_cls", dtype=torch.float32, device="cpu", progress=False)
    logits = model(torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))
    logits.sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_lora_trains_an_encoder_with_and_without_checkpointing() -> None:
    model, _ = load(MODELS / "bert_token_cls", quantize="nf4-dq", dtype=torch.float32, device="cpu", progress=False)
    lowrank.attach(model, LoRAConfig(rank=4), targets=["query", "value"], train_also=["classifier"])
    ids, gradients = torch.arange(12).view(2, 6), []
    for model.checkpointing in (False, True):
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(model(ids).square().mean(), trained))
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and any(g.abs().max() > 0 for g in gradients[0])


def test_refusals() -> None:
    raw = json.loads((MODELS / "bert_mlm" / "config.json").read_text())
    with pytest.raises(ConfigError, match="'BertForQuestionAnswering' is not implemented; known endings"):
        config_from_json({**raw, "architectures": ["BertForQuestionAnswering"]})
    with pytest.raises(ConfigError, match="position_embedding_type = 'relative_key' is not implemented"):
        config_from_json({**raw, "position_embedding_type": "relative_key"})
    model, _ = load(MODELS / "bert_mlm", progress=False)
    with pytest.raises(ValueError, match="an encoder does not generate text"):
        generate_ids(model, [[1]], 3)
    with pytest.raises(ValueError, match="the model has 128 positions"):
        model(torch.zeros(1, 129, dtype=torch.long))
