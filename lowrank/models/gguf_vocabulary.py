"""The vocabulary in a GGUF file's metadata as a tokenizer of the `tokenizers` library.

tokenizer.ggml.model = gpt2     byte-level BPE: tokens, merges, and the rule `pre` that cuts a text into words first
tokenizer.ggml.model = llama    sentencepiece's BPE: tokens with scores, byte tokens for what is in no token
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lowrank.errors import FileFormatError, unknown

KINDS = ("gpt2", "llama")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
_LLAMA3_WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {  # tokenizer.ggml.pre -> (digits stand alone first, the words' pattern)
    "smollm": (True, _GPT2_WORDS),
    "starcoder": (True, _GPT2_WORDS),
    "gpt-2": (False, _GPT2_WORDS),
    "default": (False, _GPT2_WORDS),
    "phi-2": (False, _GPT2_WORDS),
    "llama-bpe": (False, _LLAMA3_WORDS),
    "llama3": (False, _LLAMA3_WORDS),
    "qwen2": (False, _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether a text begins with BOS. Where the file is silent: for sentencepiece vocabularies and Llama 3."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    pre = metadata.get("tokenizer.ggml.pre")
    return metadata.get("tokenizer.ggml.model") == "llama" or pre in ("llama-bpe", "llama3")


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """What the tokenizers library raises, as ours: plain Exceptions, and a BaseException where its own code panics."""
    try:
        yield
    except (ValueError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise FileFormatError(f"{message}: {error}") from error


def build(metadata: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    """The tokenizer, with control tokens as special ones. Errors name the file and the key."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise ValueError(
            f"{where} has a tokenizer of kind {kind!r}; from GGUF metadata {' and '.join(KINDS)} are read. "
            "Put the model's tokenizer.json or tokenizer.model beside the file"
        )
    tokens = _list(metadata, "tokens", str, where)
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise FileFormatError(f"{where}: {len(types)} token types for {len(tokens)} tokens")
    with library_errors(f"{where}: the tokenizer's vocabulary and merges do not fit together"):
        inner = (_byte_level if kind == "gpt2" else _pieces)(metadata, tokens, types, where)
    for which, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types) if k == which]
        inner.add_special_tokens(added) if special else inner.add_tokens(added)
    return inner


def _byte_level(metadata: dict[str, Any], tokens: list[str], types: list[int], where: str) -> tokenizers.Tokenizer:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in RULES:
        raise unknown(f"pre-tokenizer in {where}:", rule, RULES)
    digits, words = RULES[rule]
    merges = [tuple(merge.split(" ", 1)) for merge in _list(metadata, "merges", str, where)]
    if any(len(pair) != 2 for pair in merges):
        raise FileFormatError(f"{where}: a merge must be two tokens with a space between them")
    vocab = {token: i for i, token in enumerate(tokens)}
    # llama.cpp takes a word that is a token whole, without merging, for Llama 3 alone
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words is _LLAMA3_WORDS))  # type: ignore[arg-type]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix"))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [
        pre_tokenizers.Split(Regex(words), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
    ]
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return inner


def _pieces(metadata: dict[str, Any], tokens: list[str], types: list[int], where: str) -> tokenizers.Tokenizer:
    """sentencepiece joins the neighbours whose union scores best: merges in the order of the unions' scores."""
    scores = _list(metadata, "scores", float, where)
    if len(scores) != len(tokens):
        raise FileFormatError(f"{where}: {len(scores)} scores for {len(tokens)} tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    order = sorted((i for i, kind in enumerate(types) if kind == NORMAL), key=lambda i: -scores[i])
    merges = []
    for i in order:
        token = tokens[i]
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += sorted(
            (p for p in splits if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]])
        )
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not (isinstance(unknown_id, int) and 0 <= unknown_id < len(tokens)):
        raise FileFormatError(f"{where}: unknown_token_id is {unknown_id!r}, the vocabulary has {len(tokens)} tokens")
    model = models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown_id], fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)  # type: ignore[arg-type]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    space = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner


def _list(metadata: dict[str, Any], name: str, of: type, where: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value or not all(isinstance(item, of) for item in value):
        raise FileFormatError(f"{where}: tokenizer.ggml.{name} must be a list of {of.__name__} values")
    return value
