"""What a batch may look like without changing a number: padding, packing, caching, checkpointing, adapters by row."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank.adapter import adapted_layers
from lowrank.methods.bottleneck import HoulsbyConfig
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.prefix import PrefixConfig
from lowrank.models.decoder import KVCache, _in_blocks, attend, positions_from_mask

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def batch(lengths: list[int], left: bool = False, width: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask; the tokens of row i are the same wherever the padding stands."""
    width = width or max(lengths)
    ids, mask = torch.full((len(lengths), width), 7), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, n in enumerate(lengths):
        at = slice(width - n, width) if left else slice(0, n)
        ids[i, at] = torch.randint(3, 190, (n,), generator=torch.Generator().manual_seed(i))
        mask[i, at] = 1
    return ids, mask


def run(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model(ids, mask, positions_from_mask(mask))


def attach(model: nn.Module, config: object, name: str, **options: object) -> None:
    lowrank.attach(model, config, name=name, **options)
    torch.manual_seed(len(name))
    for _, layer in adapted_layers(model, name):
        for p in layer.adapters[name].parameters():
            nn.init.normal_(p, std=0.1)


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 0, 0]]


def test_left_right_and_no_padding_agree(tiny: nn.Module) -> None:
    lengths = [9, 4, 13]
    right, left = (run(tiny, *batch(lengths, left=side)) for side in (False, True))
    for i, n in enumerate(lengths):
        alone = tiny(batch(lengths)[0][i : i + 1, :n])[0]
        torch.testing.assert_close(right[i, :n], alone, **TOLERANCE)
        torch.testing.assert_close(left[i, -n:], alone, **TOLERANCE)


def test_gradients_do_not_depend_on_padding(tiny: nn.Module) -> None:
    attach(tiny, LoRAConfig(rank=4), "a")
    lengths, gradients = [9, 4, 13], []
    for left, width in ((False, 0), (True, 0), (False, 20)):
        ids, mask = batch(lengths, left, width)
        labels = ids.masked_fill(mask == 0, -100)
        hidden = tiny.hidden(ids, mask, positions_from_mask(mask))
        targets = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
        loss = F.cross_entropy(tiny.head(hidden[:, :-1][targets != -100]), targets[targets != -100])
        trained = [p for p in tiny.parameters() if p.requires_grad]
        gradients.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("lengths", [[5, 0, 3], [0, 0]])
@pytest.mark.parametrize("left", [False, True])
def test_rows_of_padding_alone_give_no_nan(tiny: nn.Module, lengths: list[int], left: bool) -> None:
    ids, mask = batch(lengths, left, width=6)
    logits = run(tiny, ids, mask)
    logits.square().sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in tiny.parameters())


def test_a_cache_gives_what_the_whole_sequence_gives(tiny: nn.Module) -> None:
    ids, mask = batch([9, 4, 13], left=True)
    positions = positions_from_mask(mask)
    with torch.no_grad():
        whole = tiny(ids, mask, positions)
        cache = KVCache(tiny.config, 3, 6, torch.float32, ids.device)  # smaller than what comes: it grows
        steps = [slice(0, 10), slice(10, 11), slice(11, 13)]
        parts = [tiny(ids[:, s], mask[:, : s.stop], positions[:, s], cache=cache) for s in steps]
    got = torch.cat(parts, dim=1)
    torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], **TOLERANCE)


def test_checkpointing_changes_no_gradient(tiny: nn.Module) -> None:
    attach(tiny, LoRAConfig(rank=4), "a")
    ids, mask = batch([9, 4])
    trained, gradients = [p for p in tiny.parameters() if p.requires_grad], []
    for tiny.checkpointing in (False, True):
        gradients.append(torch.autograd.grad(run(tiny, ids, mask)[mask.bool()].square().mean(), trained))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_adapters_by_row_in_a_padded_batch(tiny: nn.Module) -> None:
    """Padding may not be taken out where a row has its own adapter."""
    attach(tiny, LoRAConfig(rank=4), "a")
    attach(tiny, LoRAConfig(rank=2), "bb")
    ids, mask = batch([9, 4, 13])
    with lowrank.rows(tiny, ["a", None, "bb"]), torch.no_grad():
        mixed = run(tiny, ids, mask)
    for i, choice in enumerate(["a", None, "bb"]):
        lowrank.activate(tiny, choice)
        with torch.no_grad():
            alone = run(tiny, ids, mask)
        torch.testing.assert_close(mixed[i][mask[i].bool()], alone[i][mask[i].bool()], **TOLERANCE)


@pytest.mark.parametrize(("config", "name"), [(PrefixConfig(), "prefix"), (HoulsbyConfig(), "bottleneck")])
def test_places_between_the_layers(tiny: nn.Module, config: object, name: str) -> None:
    """Prefix tuning and bottleneck adapters find their slots, act, and see no padding."""
    ids, mask = batch([9, 4, 13])
    base = run(tiny, ids, mask).detach()
    attach(tiny, config, name)
    with torch.no_grad():
        right, (left_ids, left_mask) = run(tiny, ids, mask), batch([9, 4, 13], left=True)
        left = run(tiny, left_ids, left_mask)
    assert (right - base)[mask.bool()].abs().max() > 1e-3
    torch.testing.assert_close(right[mask.bool()], left[left_mask.bool()], **TOLERANCE)
    lowrank.detach(tiny, name)
    torch.testing.assert_close(run(tiny, ids, mask), base, rtol=0, atol=0)


def test_module_paths_are_the_checkpoint_s_own(tiny: nn.Module) -> None:
    paths = [path for path, _ in tiny.named_parameters()]
    assert paths[0] == "model.embed_tokens.weight" and paths[-1] == "lm_head.weight"
    assert "model.layers.1.self_attn.q_proj.weight" in paths


def test_a_mask_of_the_wrong_shape(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 9\), got \(2, 8\)"):
        tiny(torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))


def test_bf16_is_close_to_fp32(tiny: nn.Module) -> None:
    ids, mask = batch([9, 4, 13])
    exact = run(tiny, ids, mask).detach()
    low = run(tiny.to(torch.bfloat16), ids, mask)
    assert low.dtype == torch.bfloat16
    error = (low.float() - exact)[mask.bool()]
    assert error.abs().mean() < 0.03 * exact.std()  # 2 layers with 8 bits of mantissa


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_long_prompts_in_bf16_are_as_exact_as_the_library(heads: int, kv_heads: int) -> None:
    """Its kernel rounds the shares too, but divides by their sum afterwards: both are 2⁻⁹ off, here and there."""
    draw = torch.Generator().manual_seed(0)
    sizes = heads, kv_heads, kv_heads
    q, k, v = (torch.randn(2, 200, n, 32, generator=draw).bfloat16().transpose(1, 2) for n in sizes)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    library = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with torch.no_grad():
        ways = [_in_blocks(q, k, v, 32**-0.5), attend(q, k, v, None, True, None, None)]
    for got in ways:
        assert (got.float() - exact).norm() < 1.3 * (library.float() - exact).norm()
        assert (got.float() - exact).abs().max() < 2**-7 * v.float().abs().max()
