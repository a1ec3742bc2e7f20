"""Damaged files: a clear error that names the file, or a model; never a crash, another exception, or code that runs."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.load import load
from lowrank.models.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
COUNT = 150


def damage(raw: bytes, rng: random.Random, head: int) -> bytes:
    """Cut off, flip bits or overwrite digits, mostly in the first `head` bytes."""
    out = bytearray(raw)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(min(head, len(out)))
        if kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at] = rng.choice(b'0123456789-{}[]",:')
        else:
            out[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
    return bytes(out)


def attempts(read: Callable[[], object], write: Callable[[bytes], object], whole: bytes, head: int, count: int) -> int:
    """How many of `count` damaged files were refused, each with one of our errors."""
    rng, refused = random.Random(1), 0
    for _ in range(count):
        write(damage(whole, rng, head))
        try:
            read()
        except (FileFormatError, ConfigError, FileNotFoundError, ValueError) as error:
            assert type(error) in (FileFormatError, ConfigError, FileNotFoundError, ValueError) and len(str(error)) > 20
            refused += 1
    return refused


@pytest.mark.parametrize("name", ["llama", "gemma3", "chatglm3", "bert_mlm"])
def test_configurations(copied, name: str) -> None:
    file = copied(name) / "config.json"
    whole = file.read_bytes()
    assert attempts(lambda: load(file.parent, progress=False), file.write_bytes, whole, len(whole), COUNT) > COUNT / 2


@pytest.mark.parametrize("quantized", [False, True])
def test_weights(copied, tmp_path: Path, quantized: bool) -> None:
    folder = copied("llama")
    if quantized:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(FIXTURES / "models" / "bnb4bit" / "nf4_double" / name, folder / name)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    assert attempts(lambda: load(folder, progress=False), file.write_bytes, whole, head, COUNT) > COUNT / 2


def test_an_index_of_shards(copied) -> None:
    file = copied("llama_tied_sharded") / "model.safetensors.index.json"
    whole = file.read_bytes()
    assert attempts(lambda: load(file.parent, progress=False), file.write_bytes, whole, len(whole), COUNT) > COUNT / 4


def test_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    whole = (FIXTURES / "tokenizer" / "test_model.model").read_bytes()
    assert attempts(lambda: load_tokenizer(file), file.write_bytes, whole, len(whole), 20) > 0
