"""The methods on a whole decoder: generation, padding, rows in training with checkpointing, the places it offers."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank.active import acting
from lowrank.adapter import METHODS, adapted_layers
from lowrank.hosts import randomise
from lowrank.methods.bottleneck import HoulsbyConfig, ParallelConfig, PfeifferConfig
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.p_tuning import PTuningConfig
from lowrank.methods.prefix import PrefixConfig
from lowrank.methods.prompt import PromptConfig
from lowrank.models.generate import generate_ids

LLAMA = Path(__file__).parents[1] / "fixtures" / "models" / "llama"
PROMPTS = [[5, 17, 33, 80], [9, 120, 7], [44, 3, 61, 2, 15, 90]]
TOKENS = {
    "prompt": PromptConfig(tokens=3),
    "p_tuning": PTuningConfig(tokens=3, hidden=16),
    "prefix": PrefixConfig(tokens=3),
    "prefix through an MLP": PrefixConfig(tokens=3, hidden=8),
}


@pytest.fixture
def llama():
    return lowrank.load(LLAMA, dtype=torch.float32, progress=False)[0].eval()


def add(model: nn.Module, config: object, name: str = "a", seed: int = 0, **options: object) -> None:
    torch.manual_seed(seed)
    lowrank.attach(model, config, name=name, **options)
    for _, layer in adapted_layers(model, name):
        randomise(layer.adapters[name], seed)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_default_targets_are_there_and_training_moves_them(llama, name: str) -> None:
    torch.manual_seed(0)
    coverage = lowrank.attach(llama, METHODS[name].Config())
    assert coverage.trainable > 0 and "trainable" in str(coverage)
    ids = torch.tensor(PROMPTS[2:])
    parameters = [p for p in llama.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    losses = []
    llama.train()
    for _ in range(3):
        logits = llama.head(llama.hidden(ids))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    lowrank.detach(llama)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_train_also_stands_beside_every_method_in_fp32_on_a_16_bit_base(name: str, tmp_path) -> None:
    def fresh():
        return lowrank.load(LLAMA, dtype=torch.bfloat16, progress=False)[0].eval()

    also = ["input_layernorm", "lm_head"] + (["embed_tokens"] if METHODS[name].place != "embeddings" else [])
    model, ids = fresh(), torch.tensor(PROMPTS[2:])
    before, bits = model(ids), {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    lowrank.attach(model, METHODS[name].Config(), train_also=also)
    model(ids).float().square().sum().backward()
    copies = {path: layer.adapters["default"] for path, layer in adapted_layers(model) if path.endswith(tuple(also))}
    assert len(copies) == 2 + len(also) - 1  # two layers, each with its norm
    for path, copy in copies.items():
        assert copy.weight.dtype == torch.float32 and copy.weight.grad.any(), path
        with torch.no_grad():
            copy.weight -= 0.1 * copy.weight.grad.sign()
    with torch.no_grad():  # training attends by another sum
        trained = model(ids)
    assert trained.dtype == torch.bfloat16 and not torch.equal(trained, before)
    lowrank.save_adapter(model, tmp_path)
    lowrank.detach(model)
    assert torch.equal(model(ids), before)
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    other = fresh()
    lowrank.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(ids), trained)


def test_a_layer_is_a_target_or_a_copy_and_never_both(llama) -> None:
    for config, targets, also in ((LoRAConfig(), ["q_proj"], ["q_proj"]), (PromptConfig(), None, ["embed_tokens"])):
        with pytest.raises(ValueError, match=f"{also[0]} is a target and in train_also"):
            lowrank.attach(llama, config, targets, train_also=also)
        assert "_lowrank" not in llama.__dict__


@pytest.mark.parametrize("name", TOKENS)
def test_virtual_tokens_are_seen_by_generation_once(llama, name: str) -> None:
    """With a cache, batched and left-padded, the same tokens come out as by running everything anew each time."""
    add(llama, TOKENS[name])
    got = generate_ids(llama, PROMPTS, 6, pad_id=0)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
    with acting(llama, None):
        assert generate_ids(llama, PROMPTS, 6, pad_id=0) != got


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_logits_are_for_the_virtual_tokens_too_and_hidden_is_not(llama, name: str) -> None:
    add(llama, TOKENS[name])
    ids = torch.tensor(PROMPTS[:1])
    assert llama(ids).shape[1] == 3 + 4 and llama.hidden(ids).shape[1] == 4
    torch.testing.assert_close(llama.head(llama.hidden(ids)), llama(ids)[:, 3:])


def test_a_prompt_of_real_embeddings_is_the_same_as_real_tokens(llama) -> None:
    lowrank.attach(llama, PromptConfig(tokens=3))
    start = [11, 50, 99]
    with torch.no_grad():
        layer = llama.model.embed_tokens
        layer.adapters["default"].prompt_embeddings.copy_(layer.base.weight[start])
        with_tokens = llama(torch.tensor(PROMPTS[:1]))
        lowrank.activate(llama, None)
        torch.testing.assert_close(with_tokens, llama(torch.tensor([start + PROMPTS[0]])))


def test_several_token_methods_at_once_are_an_error(llama) -> None:
    add(llama, PromptConfig(tokens=3), "a")
    add(llama, PromptConfig(tokens=3), "b")
    add(llama, PromptConfig(tokens=2), "c")
    ids = torch.tensor([PROMPTS[0]] * 2)
    lowrank.activate(llama, ["a", "b"])
    with pytest.raises(ValueError, match="alone and with weight 1"):
        llama(ids)
    lowrank.activate(llama, {"a": 0.5})
    with pytest.raises(ValueError, match="alone and with weight 1"):
        llama(ids)
    with lowrank.rows(llama, ["a", "b"]):
        together = llama(ids)
    for i, name in enumerate("ab"):
        with acting(llama, name):
            torch.testing.assert_close(together[i : i + 1], llama(ids[:1]))
    with pytest.raises(ValueError, match="same number"), lowrank.rows(llama, ["a", "c"]):
        llama(ids)


def test_bottlenecks_go_where_their_papers_say(llama) -> None:
    for config, ends in (
        (HoulsbyConfig(), {"attn_slot", "mlp_slot"}),
        (PfeifferConfig(), {"mlp_slot"}),
        (ParallelConfig(), {"mlp_slot"}),
    ):
        coverage = lowrank.attach(llama, config)
        assert set(coverage.layers) == ends and all(len(paths) == 2 for paths in coverage.layers.values())
        lowrank.detach(llama)


@pytest.mark.parametrize("config", [HoulsbyConfig(), PrefixConfig()])
def test_a_model_without_the_place_says_so(config) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Sequential does not offer .*lowrank's own models do"):
        lowrank.attach(model, config)
    with pytest.raises(ValueError, match="has nothing that an adapter of place 'embeddings'"):
        lowrank.attach(model, PromptConfig())


def test_rows_train_through_checkpointing_with_the_forwards_adapters(llama) -> None:
    add(llama, LoRAConfig(rank=4), "a", 1)
    add(llama, LoRAConfig(rank=2), "b", 2)
    for _, layer in adapted_layers(llama):
        layer.adapters.requires_grad_(True)
    ids = torch.tensor([PROMPTS[0]] * 3)
    gradients = []
    for checkpointing in (False, True):
        llama.checkpointing = checkpointing
        llama.zero_grad(set_to_none=True)
        with lowrank.rows(llama, ["a", None, {"a": 0.5, "b": 2.0}]):
            loss = llama(ids).square().mean()
        loss.backward()  # outside the block
        gradients.append({name: p.grad for name, p in llama.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(".b." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_hot_swap_leaves_the_base_alone(llama) -> None:
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        base = llama(ids)
        for i in range(3):
            add(llama, LoRAConfig(rank=2), f"n{i}", i)
            assert not torch.equal(llama(ids), base)
            with acting(llama, None):
                assert torch.equal(llama(ids), base)
        for i in range(3):
            lowrank.detach(llama, f"n{i}")
        assert torch.equal(llama(ids), base)
