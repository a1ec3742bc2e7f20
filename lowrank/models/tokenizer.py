"""Text to ids and back: tokenizer.json, tokenizer.model (sentencepiece) or GGUF metadata, behind one small class.

Special tokens written in a text are plain text unless `parse_special=True`. A chat template's text holds them on
purpose and is encoded with it, so a control token that somebody types into a message counts as one, as in the
checkpoint's own tools: check what comes from strangers before it goes into a template.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lowrank.errors import FileFormatError
from lowrank.files import read_json
from lowrank.models.checkpoint import Checkpoint, GGUFCheckpoint
from lowrank.models.gguf import GGUF
from lowrank.models.gguf_vocabulary import KINDS, adds_bos, build, library_errors
from lowrank.models.templates import render, template_text


class FastVocabulary:
    """The `tokenizers` library's tokenizer: BPE, WordPiece, Unigram."""

    def __init__(self, inner: tokenizers.Tokenizer, add_bos: int | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner, self.add_bos = inner, add_bos
        self.size: int = inner.get_vocab_size(with_added_tokens=True)

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(f"{self.inner.to_str()} {self.add_bos}".encode()).hexdigest()

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        self.inner.encode_special_tokens = not parse_special  # True there means: as plain text
        ids: list[int] = self.inner.encode(text, add_special_tokens=add_special).ids
        return [self.add_bos, *ids] if add_special and self.add_bos is not None else ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=skip_special))

    def token(self, id: int) -> str:
        return self.inner.id_to_token(id) or ""

    def id(self, token: str) -> int | None:
        found: int | None = self.inner.token_to_id(token)
        return found


CHATGLM = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""ChatGLM's own tokens: they follow the pieces in this order, and no file says so."""


class PieceVocabulary:
    """A sentencepiece model. Control pieces and `added` tokens, which it never parses, are cut out of a text first."""

    def __init__(self, model: bytes, where: str, added: dict[str, int] | None = None, chatglm: bool = False) -> None:
        import sentencepiece

        try:
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise FileFormatError(f"{where} is damaged or no sentencepiece model: {error}") from error
        self.pieces: int = self.inner.get_piece_size()
        self.added = {name: self.pieces + i for i, name in enumerate(CHATGLM)} if chatglm else added or {}
        self.names = {id: name for name, id in self.added.items()}
        self.size = max(self.pieces, *(id + 1 for id in self.names)) if self.names else self.pieces
        self.hash = hashlib.sha256(model + json.dumps(self.added or "").encode() if self.added else model).hexdigest()
        control = [self.inner.id_to_piece(i) for i in range(self.pieces) if self.inner.is_control(i)]
        self._special = {piece: self.inner.piece_to_id(piece) for piece in control if piece} | self.added
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")")
        begin = [self.added["[gMASK]"], self.added["sop"]] if chatglm else [self.inner.bos_id()]
        self._begin = [id for id in begin if id >= 0]

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text) if parse_special and self._special else [text]:
            ids += [self._special[part]] if parse_special and part in self._special else self.inner.encode(part)
        return [*self._begin, *ids] if add_special else ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        parts: list[str] = []
        run: list[int] = []
        for i in [i for i in ids if not (skip_special and self._is_special(i))]:
            if self._is_special(i):
                parts += [self.inner.decode(run), self.token(i)]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self.inner.decode(run)])

    def _is_special(self, id: int) -> bool:
        return not 0 <= id < self.pieces or self.inner.is_control(id)

    def token(self, id: int) -> str:
        return self.names.get(id) or (str(self.inner.id_to_piece(id)) if 0 <= id < self.pieces else "")

    def id(self, token: str) -> int | None:
        found = self.added.get(token, self.inner.piece_to_id(token))
        return found if self.token(found) == token else None


Vocabulary = FastVocabulary | PieceVocabulary


@dataclass(frozen=True)
class Tokenizer:
    vocabulary: Vocabulary
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    """Every token that ends an answer."""
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def hash(self) -> str:
        """SHA-256 of the vocabulary and its rules, without the template."""
        return self.vocabulary.hash

    @property
    def policy(self) -> dict[str, Any]:
        """What begins, ends and fills up a text: BOS and whether plain text gets it, every end token, padding."""
        bos = self.bos_id is not None and self.bos_id in self.encode("a", add_special=True)[:1]
        return {"bos": self.bos_id, "adds_bos": bos, "eos": sorted(self.eos_ids), "pad": self.pad_id}

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of a text. `add_special` puts the tokenizer's own BOS / EOS around it, where it has a rule for that."""
        return self.vocabulary.encode(text, add_special, parse_special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.vocabulary.decode(list(ids), skip_special)

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """The conversation as text; encode it with `parse_special=True` and without `add_special`."""
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; choose one, e.g. tokenizer.with_template('chatml')")
        return render(self.chat_template, messages, add_generation_prompt, self._special)

    def with_template(self, name_or_text: str) -> "Tokenizer":
        """The same tokenizer with a built-in chat template (by name) or the given one (its text)."""
        return replace(self, chat_template=template_text(name_or_text))

    @property
    def _special(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: "" if id is None else self.vocabulary.token(id) for name, id in ids.items()}


def gguf_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer | None:
    """The tokenizer that a GGUF file carries, None where it has none."""
    if metadata.get("tokenizer.ggml.model") in (None, "no_vocab"):
        return None
    inner = build(metadata, where)
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    size = len(metadata["tokenizer.ggml.tokens"])
    for name, id in ids.items():
        if id is not None and not (isinstance(id, int) and 0 <= id < size):
            raise FileFormatError(f"{where}: {name}_token_id is {id!r}, the vocabulary has {size} tokens")
    return Tokenizer(
        FastVocabulary(inner, add_bos=ids["bos"] if adds_bos(metadata) else None),
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["padding"],
        eos_ids=frozenset(id for id in (ids["eos"], ids["eot"]) if id is not None),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder, a tokenizer.json, a sentencepiece .model or a .gguf file."""
    path = Path(path)
    if path.suffix == ".gguf":
        found = gguf_tokenizer(GGUF(path).metadata, str(path))
        if found is None:
            raise ValueError(f"{path} carries no tokenizer")
        return found
    file = path
    if path.is_dir():
        file = next((path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()), path)
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: wanted tokenizer.json, tokenizer.model or a .gguf file")
    if file.suffix == ".json":
        read_json(file)  # a clear error for what is not JSON
        with library_errors(f"{file} is damaged or no tokenizer.json"):
            vocabulary: Vocabulary = FastVocabulary(tokenizers.Tokenizer.from_file(str(file)))
            vocabulary.encode("a 1", True, True)  # what is wrong with its rules shows here
    else:
        settings = _object(file.parent / "tokenizer_config.json")
        chatglm = settings.get("tokenizer_class") == "ChatGLMTokenizer"
        vocabulary = PieceVocabulary(file.read_bytes(), str(file), _added(settings), chatglm)
    return _with_settings(vocabulary, file.parent)


def _added(settings: dict[str, Any]) -> dict[str, int]:
    """{text: id} of `added_tokens_decoder`, in which a tokenizer_config.json names tokens beyond the vocabulary."""
    listed = settings.get("added_tokens_decoder")
    rows = listed.items() if isinstance(listed, dict) else ()
    named = {id: token.get("content") for id, token in rows if isinstance(token, dict) and id.isdecimal()}
    return {text: int(id) for id, text in named.items() if isinstance(text, str) and text and len(id) < 9}


def _with_settings(vocabulary: Vocabulary, folder: Path) -> Tokenizer:
    """Special ids and the chat template from the JSON files that lie beside a tokenizer."""
    settings = _object(folder / "tokenizer_config.json")
    special = {**_object(folder / "special_tokens_map.json"), **settings}
    config, generation = _object(folder / "config.json"), _object(folder / "generation_config.json")

    def id_of(name: str) -> int | None:
        token = special.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and vocabulary.id(token) is not None:
            return vocabulary.id(token)
        ids = config.get(f"{name}_token_id")
        ids = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(ids, int) and 0 <= ids < vocabulary.size:
            return ids
        inner = getattr(vocabulary, "inner", None)
        method = getattr(inner, f"{name}_id", None)  # sentencepiece says it itself
        return method() if callable(method) and method() >= 0 else None

    eos = id_of("eos")
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    if isinstance(vocabulary, PieceVocabulary) and "[gMASK]" in vocabulary.added:  # an answer ends where a turn begins
        ends = [*ends, vocabulary.added["<|user|>"], vocabulary.added["<|observation|>"]]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones: the default
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    return Tokenizer(
        vocabulary,
        bos_id=id_of("bos"),
        eos_id=eos,
        pad_id=id_of("pad"),
        eos_ids=frozenset(id for id in (eos, *ends) if isinstance(id, int) and id >= 0),
        chat_template=template if isinstance(template, str) else None,
    )


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} must hold a JSON object, got {json.dumps(value)[:40]}")
    return value


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """A checkpoint's tokenizer: beside it as a file, or in the GGUF's metadata; None where there is none."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    beside = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if isinstance(checkpoint, GGUFCheckpoint):
        kind = checkpoint.gguf.metadata.get("tokenizer.ggml.model")
        if kind in KINDS or (kind is not None and not beside):
            return gguf_tokenizer(checkpoint.gguf.metadata, str(checkpoint.path))
    return load_tokenizer(folder) if beside else None
