"""Chat templates: the built-in ones, a checkpoint's own, and what the sandbox stops."""

import json
import shutil

import pytest

from lowrank.data.batches import collate
from lowrank.data.records import Record
from lowrank.data.render import IGNORE, Renderer
from lowrank.models.load import load_tokenizer_of
from lowrank.models.templates import BUILT_IN, render, template_text

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_prompt_is_a_prefix_of_the_whole_conversation(name: str) -> None:
    """Training reads prompt and answer as one text: the prompt must end where the answer begins."""
    for turns in (1, 3):
        prompt = render(BUILT_IN[name], CHAT[:turns], True, SPECIAL)
        whole = render(BUILT_IN[name], [*CHAT[:turns], {"role": "assistant", "content": "A"}], False, SPECIAL)
        assert whole.startswith(prompt) and whole[len(prompt) :].strip().startswith("A")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_system_message_appears_once_and_none_is_invented(name: str) -> None:
    with_system = render(BUILT_IN[name], [{"role": "system", "content": "Be brief."}, *CHAT], True, SPECIAL)
    without = render(BUILT_IN[name], CHAT, True, SPECIAL)
    assert with_system.count("Be brief.") == 1 and "ystem" not in without


def test_chatml_text() -> None:
    text = render(BUILT_IN["chatml"], CHAT[:1], True, SPECIAL)
    assert text == "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"


def test_unknown_name_and_broken_text() -> None:
    with pytest.raises(ValueError, match="did you mean 'chatml'"):
        template_text("chatm")
    with pytest.raises(ValueError, match="cannot be read"):
        template_text("{% for m in %}")
    assert template_text("{{ messages }}") == "{{ messages }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ messages[7]['content'] }}",
    ],
)
def test_the_sandbox_refuses(template: str) -> None:
    with pytest.raises(ValueError, match="refused a conversation"):
        render(template, CHAT, False, SPECIAL)


def test_tags_that_checkpoints_use() -> None:
    template = (
        "{%- for m in messages -%}{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ {'a': 'é'} | tojson }}{{ strftime_now('%Y')[:2] }}"
    )
    assert render(template, CHAT, False, SPECIAL) == 'Q1A1Q2{"a": "é"}20'


@pytest.mark.parametrize("name", BUILT_IN)
def test_training_and_generation_have_exactly_the_template_s_bos(name: str, talking_folder) -> None:
    """No BOS is put before what the template writes, and none of the template's is lost."""
    tokenizer = load_tokenizer_of(talking_folder, name)
    record = Record(instruction="Q1", output="A1")
    text = tokenizer.apply_chat_template(record.conversation()[:1], add_generation_prompt=True)
    wanted = text.count("<|im_start|>")  # the tokenizer's BOS
    renderer = Renderer(tokenizer)
    assert renderer.prompt_ids(record).count(tokenizer.bos_id) == wanted
    assert renderer.example(record).input_ids.count(tokenizer.bos_id) == wanted


@pytest.mark.parametrize("name", ["plain", "chatml", "mistral"])
def test_the_end_is_learned_also_where_it_is_the_padding(name: str, talking_folder, tmp_path) -> None:
    shutil.copytree(talking_folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|im_end|>"}))
    tokenizer = load_tokenizer_of(tmp_path, name)
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    examples = [Renderer(tokenizer).example(Record(instruction="Q", output=answer)) for answer in ("A", "a longer one")]
    batch = collate(examples, tokenizer.pad_id)
    for row, example in zip(batch["labels"].tolist(), examples):
        padding = [IGNORE] * (len(row) - len(example.labels))
        assert example.labels[-1] == 2 and row == example.labels + padding and row.count(2) == 1
