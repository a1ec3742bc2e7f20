"""Tokenizers against the libraries that own the formats."""

import json
from pathlib import Path

import pytest

from lowrank.errors import FileFormatError
from lowrank.models.gguf import GGUF
from lowrank.models.tokenizer import gguf_tokenizer, load_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tokenizer"


def cases(name: str) -> list[dict]:
    return json.loads((FIXTURES / f"{name}_cases.json").read_text(encoding="utf-8"))["cases"]


def test_smollm2_from_gguf_metadata_with_single_digits(smollm2_file: Path) -> None:
    tokenizer = load_tokenizer(smollm2_file)
    for case in cases("smollm2"):
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special=False) == case["text"]


def test_sentencepiece_model() -> None:
    tokenizer = load_tokenizer(FIXTURES / "test_model.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    for case in cases("sp_test"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.encode("Hello", add_special=True)[0] == 1
    assert tokenizer.encode("Hello</s>", parse_special=True) == [*tokenizer.encode("Hello"), 2]
    assert 2 not in tokenizer.encode("Hello</s>")


def test_tokenizer_json_with_settings(smollm2_file: Path, tmp_path: Path) -> None:
    """The same vocabulary written as tokenizer.json, with truncation and padding on, which must be ignored."""
    built = load_tokenizer(smollm2_file)
    raw = json.loads(built.vocabulary.inner.to_str())
    raw["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    settings = {
        "eos_token": "<|im_end|>",
        "bos_token": {"content": "<|im_start|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}{{ eos_token }}"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids) == (1, 2, 0, {0, 2})
    text = "In 2024 the law of 1789 was 3,14 times longer."
    assert tokenizer.encode(text) == built.encode(text) and len(tokenizer.encode(text)) > 4
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == "a<|im_end|>"


def test_same_hash_for_the_same_rules_only(smollm2_file: Path) -> None:
    metadata = GGUF(smollm2_file).metadata
    built = gguf_tokenizer(metadata, "a")
    assert built is not None and built.hash == load_tokenizer(smollm2_file).hash
    other = gguf_tokenizer({**metadata, "tokenizer.ggml.pre": "gpt-2"}, "a")
    assert other is not None and other.hash != built.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, "did you mean 'smollm'"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.json or tokenizer\.model"),
        ({"tokenizer.ggml.tokens": "abc"}, "list of str values"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types for 4 tokens"),
        ({"tokenizer.ggml.merges": ["ab"]}, "two tokens with a space"),
        ({"tokenizer.ggml.merges": ["a z"]}, "do not fit together"),
        ({"tokenizer.ggml.eos_token_id": 99}, "eos_token_id is 99"),
    ],
)
def test_bad_metadata_says_what_is_wrong(changes: dict, message: str) -> None:
    good = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
    }
    tokenizer = gguf_tokenizer(good, "x.gguf")
    assert tokenizer is not None and tokenizer.encode("ab<e>", parse_special=True) == [2, 3]
    with pytest.raises((FileFormatError, ValueError), match=message):
        gguf_tokenizer({**good, **changes}, "x.gguf")


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", b"{"), ("tokenizer.json", b"{}"), ("tokenizer.model", b"\x00x")]
)
def test_damaged_tokenizer_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=name):
        load_tokenizer(tmp_path)


def test_no_tokenizer_and_no_template(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wanted tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="with_template"):
        load_tokenizer(FIXTURES / "test_model.model").apply_chat_template([{"role": "user", "content": "a"}])


def test_sentencepiece_bpe_from_gguf_metadata() -> None:
    """Scores decide, not the order of the text: "ab" before "bc"; bytes for what is in no token; runs of spaces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    pieces = ["▁", "a", "b", "c", "bc", "ab", "▁ab", "▁▁"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *pieces],
        "tokenizer.ggml.scores": [*scores, -90.0, -91.0, -92.0, -93.0, -3.0, -2.0, -4.0, -1.0],
        "tokenizer.ggml.token_type": types + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = gguf_tokenizer(metadata, "x.gguf")
    assert tokenizer is not None
    names = [tokenizer.vocabulary.token(i) for i in tokenizer.encode("abc")]
    assert names == ["▁ab", "c"]
    assert tokenizer.encode("a", add_special=True)[0] == 1 and tokenizer.encode("a")[0] != 1
    for text in ("abc", "a  b", "é", "héab 你", "a\nb"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a</s>", parse_special=True)[-1] == 2 and 2 not in tokenizer.encode("a</s>")
    with pytest.raises(FileFormatError, match="1 scores for 267 tokens"):
        gguf_tokenizer({**metadata, "tokenizer.ggml.scores": [1.0]}, "x.gguf")


@pytest.fixture
def chatglm(tmp_path: Path):
    """ChatGLM3's tokenizer over a stand-in vocabulary: sentencepiece's test model instead of its own 64,789 pieces."""
    (tmp_path / "tokenizer.model").write_bytes((FIXTURES / "test_model.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    return load_tokenizer(tmp_path).with_template("chatglm3")


def test_chatglm3_s_chat_format(chatglm) -> None:
    """The published tokenizer's order of special tokens; between them role line and content, each encoded by itself."""
    raw = json.loads((FIXTURES / "chatglm3_chat.json").read_text(encoding="utf-8"))
    first = min(raw["special_tokens"].values())
    theirs = {id: name for name, id in raw["special_tokens"].items()}
    assert [chatglm.vocabulary.id(name) for name in theirs.values()] == [1000 + id - first for id in theirs]
    for case in raw["chat"]:
        messages = [*case["history"], {"role": "user", "content": case["query"]}]
        ids = chatglm.encode(chatglm.apply_chat_template(messages, add_generation_prompt=True), parse_special=True)
        specials = [chatglm.vocabulary.token(i) for i in ids if i >= 1000]
        assert specials == [theirs[i] for i in case["ids"] if i >= first]
        wanted = [chatglm.vocabulary.id("[gMASK]"), chatglm.vocabulary.id("sop")]
        for message in messages:
            wanted += [chatglm.vocabulary.id(f"<|{message['role']}|>"), *chatglm.encode("\n")]
            wanted += chatglm.encode(message["content"])
        assert ids == [*wanted, chatglm.vocabulary.id("<|assistant|>")]


def test_chatglm3_s_plain_text_ends_and_decoding(chatglm) -> None:
    plain = chatglm.encode("Hello", add_special=True)
    assert plain[:2] == [1001, 1003] and chatglm.vocab_size == 1009
    assert chatglm.eos_ids == {2, 1006, 1008} and chatglm.pad_id == 0 and not chatglm.policy["adds_bos"]
    assert chatglm.decode(plain) == "Hello" and chatglm.decode([*plain, 1006, 5000]) == "Hello"
    assert chatglm.decode([1006, *chatglm.encode("Hello")], skip_special=False) == "<|user|>Hello"


def test_tokens_that_a_configuration_adds_to_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((FIXTURES / "test_model.model").read_bytes())
    added = {"1000": {"content": "<pad>"}, "1002": {"content": "<tool>"}, "x": {"content": "y"}, "7": 3}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "pad_token": "<pad>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == 1000 and tokenizer.vocab_size == 1003
    assert tokenizer.encode("Hello<tool>", parse_special=True)[-1] == 1002
    assert tokenizer.hash != load_tokenizer(FIXTURES / "test_model.model").hash
