"""The one renderer: training reads what generation starts from, turn by turn, and learns the answers alone."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lowrank.data.records import Record
from lowrank.data.render import IGNORE, Renderer
from lowrank.models.tokenizer import FastVocabulary, Tokenizer

TURNS = ("what is it", "it is one", "and then", "it is two")
ROLES = ("user", "assistant", "user", "assistant")
RECORD = Record(messages=tuple({"role": role, "content": text} for role, text in zip(ROLES, TURNS)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(FastVocabulary(inner), bos_id=256, eos_id=257, eos_ids=frozenset({257}))


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_a_conversation_trains_behind_the_very_prompt_of_generation(tokenizer: Tokenizer, template: str) -> None:
    renderer = Renderer(tokenizer.with_template(template))
    example, prompt = renderer.example(RECORD), renderer.prompt_ids(RECORD)
    assert example.input_ids[: len(prompt)] == prompt
    learned = [i for i, label in zip(example.input_ids, example.labels) if label != IGNORE]
    end = "<|im_end|>"
    assert tokenizer.decode(learned, skip_special=False) == TURNS[1] + end + TURNS[3] + end
