"""Chat templates: the built-in ones, a checkpoint's own, and what the sandbox stops."""

import pytest

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
