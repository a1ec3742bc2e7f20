"""Real weights: SmolLM2's token likelihoods, greedy text, quantized loading."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lowrank
from lowrank.models.generate import generate_ids
from lowrank.quant.linear import QuantizedLinear
from lowrank.quant.tensor import QuantizedTensor

EXPECTED = json.loads((Path(__file__).parent.parent / "fixtures/tokenizer/smollm2_text.json").read_text())


def up_to_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(2)] if 2 in ids else ids


def test_token_likelihoods(smollm2) -> None:
    model, tokenizer = smollm2
    for case in EXPECTED["cases"]:
        ids = torch.tensor([tokenizer.encode(case["text"], parse_special=True)])
        assert ids[0].tolist() == case["ids"]
        with torch.no_grad():
            logits = model(ids)[0]
        nll = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(nll, torch.tensor(case["token_nll"]), atol=1e-3, rtol=0)
        top = logits[-1, case["last_top10_ids"]]
        torch.testing.assert_close(top, torch.tensor(case["last_top10_logits"]), atol=1e-3, rtol=0)


def test_greedy_text_alone_and_in_one_padded_batch(smollm2) -> None:
    model, tokenizer = smollm2
    wanted = [up_to_eos(case["greedy16"]) for case in EXPECTED["cases"]]
    prompts = [case["ids"] for case in EXPECTED["cases"]]
    assert generate_ids(model, prompts, 16, tokenizer.eos_ids, tokenizer.pad_id) == wanted
    text = lowrank.generate(model, tokenizer, EXPECTED["cases"][0]["text"], max_new_tokens=16)
    assert text == EXPECTED["cases"][0]["greedy_text"]


def test_special_ids_and_template(smollm2) -> None:
    _, tokenizer = smollm2
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids, tokenizer.vocab_size) == (2, 2, {2}, 49152)
    messages = [{"role": "user", "content": "Hi"}]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert own.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    plain = tokenizer.with_template("chatml")
    text = plain.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert plain.encode(text, parse_special=True)[0] == 1 and plain.hash == tokenizer.hash
    assert len(plain.encode(text)) > len(plain.encode(text, parse_special=True))  # typed text is no control token


def test_quantized_load_is_quantize_model_of_the_exact_weights(smollm2, smollm2_file: Path) -> None:
    exact, _ = smollm2
    model, _ = lowrank.load(smollm2_file, quantize="nf4-dq", dtype=torch.bfloat16, device="cpu", progress=False)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 210 and "lm_head" not in layers
    assert model.origin.base_hash == exact.origin.base_hash and model.origin.quantize == "nf4-dq"
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj"):
        weight = exact.get_submodule(path).weight.detach()
        wanted = QuantizedTensor.quantize(weight, "nf4", double_quant=True).dequantize(torch.float32)
        torch.testing.assert_close(layers[path].quantized.dequantize(torch.float32), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("prompt", ["The capital of France is", [{"role": "user", "content": "Say hello."}]])
def test_generate_takes_text_messages_and_lists(smollm2, prompt) -> None:
    model, tokenizer = smollm2
    one = lowrank.generate(model, tokenizer, prompt, max_new_tokens=3)
    two = lowrank.generate(model, tokenizer, [prompt, prompt], max_new_tokens=3)
    assert isinstance(one, str) and two == [one, one] and "<|im_end|>" not in one
