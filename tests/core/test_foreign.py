"""Models that are not ours: any nn.Module with linear layers and embeddings; transformers' where installed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.methods.bottleneck import HoulsbyConfig
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.oft import OFTConfig
from lowrank.methods.prefix import PrefixConfig
from lowrank.methods.prompt import PromptConfig
from lowrank.quant.linear import quantize_model

LLAMA = Path(__file__).parents[1] / "fixtures" / "models" / "llama"
IDS = torch.tensor([[5, 17, 33, 80, 9, 120], [44, 3, 61, 2, 15, 90]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


class Mean(nn.Module):
    """Predicts from the masked mean of all embeddings; knows nothing of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(130, 8), nn.Linear(8, 130)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask.float()
        self.positions = position_ids
        return self.out((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_prompt_tuning_lengthens_the_other_inputs_of_any_model() -> None:
    torch.manual_seed(0)
    model = Mean()
    before = model(IDS, attention_mask=MASK)
    lowrank.attach(model, PromptConfig(tokens=3))
    prompt = model.embed.adapters["default"].prompt_embeddings
    y = model(IDS, attention_mask=MASK, position_ids=torch.arange(6)[None])
    real = model.embed.base(IDS) * MASK[..., None]
    torch.testing.assert_close(y, model.out((real.sum(1) + prompt.sum(0)) / (MASK.sum(1, keepdim=True) + 3)))
    assert model.positions.tolist() == [list(range(9))]
    with pytest.raises(ValueError, match="by name"):
        model(IDS, MASK)
    lowrank.activate(model, None)
    assert torch.equal(model(IDS, MASK), before)
    lowrank.detach(model)
    assert torch.equal(model(IDS, MASK), before) and not model._forward_pre_hooks


def foreign(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    config = transformers.GPT2Config(vocab_size=130, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [LoRAConfig(rank=4), OFTConfig()], ids=["lora", "oft"])
@torch.no_grad()
def test_linear_methods_on_a_transformers_model(kind: str, config, tmp_path, fill_randomly) -> None:
    model = foreign(kind)
    base = model(IDS, attention_mask=MASK).logits
    coverage = lowrank.attach(model, config)
    assert "lm_head" not in coverage.layers
    assert torch.allclose(model(IDS, attention_mask=MASK).logits, base, atol=1e-5)
    fill_randomly(model, std=0.05)
    adapted = model(IDS, attention_mask=MASK).logits
    assert not torch.allclose(adapted, base, atol=1e-2)
    lowrank.save_adapter(model, tmp_path / "a")
    lowrank.merge(model)
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, adapted, atol=1e-4, rtol=1e-3)
    lowrank.unmerge(model)
    lowrank.detach(model)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, base)
    lowrank.load_adapter(model, tmp_path / "a")
    assert torch.equal(model(IDS, attention_mask=MASK).logits, adapted)


@torch.no_grad()
def test_a_quantized_transformers_model(fill_randomly) -> None:
    model = foreign("llama")
    quantize_model(model, "nf4")
    lowrank.attach(model, LoRAConfig(rank=4))
    fill_randomly(model, std=0.05)
    adapted = model(IDS, attention_mask=MASK).logits
    lowrank.merge(model)
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, adapted, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_prompt_tuning_on_a_transformers_model_is_that_on_ours() -> None:
    theirs, ours = foreign("llama"), lowrank.load(LLAMA, dtype=torch.float32, progress=False)[0].eval()
    for model in (theirs, ours):
        torch.manual_seed(1)
        lowrank.attach(model, PromptConfig(tokens=4))
    got, wanted = theirs(IDS, attention_mask=MASK, use_cache=False).logits, ours(IDS, attention_mask=MASK)
    real = torch.cat([MASK.new_ones(2, 4), MASK], dim=1).bool()
    torch.testing.assert_close(got[real], wanted[real], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [PrefixConfig(), HoulsbyConfig()])
def test_places_that_it_does_not_offer_are_an_error(config) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not offer .*lowrank's own models do"):
        lowrank.attach(foreign("llama"), config)
