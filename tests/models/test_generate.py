"""Generation: one prompt or many, greedy or sampled, the same tokens."""

import pytest
import torch
from torch import nn

import lowrank
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.prefix import PrefixConfig
from lowrank.methods.prompt import PromptConfig
from lowrank.models.generate import Sampler, generate_ids

PROMPTS = [[5, 9, 33], [101], [7, 7, 12, 80, 41, 17, 3], [64, 65]]


def test_a_padded_batch_gives_what_single_prompts_give(tiny: nn.Module) -> None:
    single = [generate_ids(tiny, [prompt], 20)[0] for prompt in PROMPTS]
    assert generate_ids(tiny, PROMPTS, 20) == single and all(len(answer) == 20 for answer in single)


def test_an_end_stops_its_row_and_no_other(tiny: nn.Module) -> None:
    free = generate_ids(tiny, PROMPTS, 20)
    ends = {free[0][4], free[2][9]}
    wanted = [row[: next((i for i, id in enumerate(row) if id in ends), 20)] for row in free]
    done: list[int] = []
    assert generate_ids(tiny, PROMPTS, 20, ends, on_progress=done.append) == wanted
    assert done == sorted(done) and done[-1] == len(PROMPTS)


def test_many_rows_leave_the_batch_in_eights(tiny: nn.Module) -> None:
    free = generate_ids(tiny, PROMPTS, 20)
    ends = {free[0][4], free[2][9], free[1][2]}
    wanted = [row[: next((i for i, id in enumerate(row) if id in ends), 20)] for row in free]
    assert len({len(row) for row in wanted}) > 2
    assert generate_ids(tiny, PROMPTS * 6, 20, ends) == wanted * 6


def test_rows_keep_their_adapters_when_others_are_done(tiny: nn.Module) -> None:
    lowrank.attach(tiny, LoRAConfig(rank=4))
    free = generate_ids(tiny, PROMPTS * 4, 20)
    with lowrank.rows(tiny, ["default", None] * 8):
        answers = generate_ids(tiny, PROMPTS * 4, 20, {row[3] for row in free[:3]})
    lowrank.detach(tiny)
    assert len({len(row) for row in answers}) > 1


def test_sampling_is_exact_by_seed_and_row_i_draws_from_seed_plus_i(tiny: nn.Module) -> None:
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    batch = generate_ids(tiny, PROMPTS, 12, seed=3, **options)
    assert batch == generate_ids(tiny, PROMPTS, 12, seed=3, **options)
    assert batch != generate_ids(tiny, PROMPTS, 12, seed=4, **options)
    assert [generate_ids(tiny, [p], 12, seed=3 + i, **options)[0] for i, p in enumerate(PROMPTS)] == batch


def test_top_k_and_top_p_cut_the_distribution() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])  # probabilities 0.03 0.64 0.24 0.09

    def seen(**options: float) -> set[int]:
        sampler = Sampler(1.0, **{"top_k": 0, "top_p": 1.0, **options}, generators=[torch.Generator().manual_seed(0)])
        return {sampler(logits, [0])[0] for _ in range(300)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 2}
    assert seen(top_p=0.6) == {1} and seen(top_p=0.7) == {1, 2}


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}])
def test_bad_settings(tiny: nn.Module, options: dict) -> None:
    with pytest.raises(ValueError, match="wanted temperature >= 0"):
        generate_ids(tiny, PROMPTS, 2, **options)


def test_nothing_to_do_and_an_empty_prompt(tiny: nn.Module) -> None:
    assert generate_ids(tiny, [], 5) == [] and generate_ids(tiny, PROMPTS, 0) == [[]] * 4
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate_ids(tiny, [[1], []], 5)


def test_training_mode_is_left_as_it_was(tiny: nn.Module) -> None:
    tiny.train()
    generate_ids(tiny, PROMPTS, 1)
    assert tiny.training


@pytest.mark.parametrize("config", [PromptConfig(tokens=3), PrefixConfig(tokens=3)])
def test_virtual_tokens_are_counted_once(tiny: nn.Module, config: object) -> None:
    """With a cache, token by token, the same answer as from the whole sequence each time."""
    lowrank.attach(tiny, config)
    wanted = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(tiny(torch.tensor([ids]))[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    assert generate_ids(tiny, PROMPTS, 8) == wanted
