"""Damaged and hostile files: a clear error that names what is wrong, or a model that runs; never a crash, another
exception, memory beyond the file's size, or code that runs.

`pytest -m slow -s tests/models/test_damaged.py` damages 20,000 files and prints how many of each kind were refused.
"""

import json
import pickle
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.export_gguf import export_gguf
from lowrank.models.families import config_from_json
from lowrank.models.load import load
from lowrank.models.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
OURS = (FileFormatError, ConfigError, FileNotFoundError, ValueError)
NUMBERS = [-1, 0, 1, 3, 255, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63), 10**30, 10**400]
VALUES = [*NUMBERS, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 9, "é\x00", None, True, [], {}, [[[]]], {"a": {}}]
ROOM = 2 << 30  # address space above what is in use: an allocation by a hostile size does not fit


@dataclass
class Target:
    """One file that is damaged, and what reads it. `head`: where most of the damage goes."""

    name: str
    file: Path
    read: Callable[[], object]
    head: int = 0

    def __post_init__(self) -> None:
        self.whole = self.file.read_bytes()
        self.head = self.head or len(self.whole)


def damaged(target: Target, rng: random.Random) -> bytes:
    """Cut off, flip bits, put in or take out bytes, or write a hostile value where the format has a field."""
    out, kind = bytearray(target.whole), rng.randrange(6)
    at = rng.randrange(min(target.head, len(out)))
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    if kind == 1:
        for _ in range(rng.randrange(1, 5)):
            out[rng.randrange(min(target.head, len(out)))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
    elif kind == 3:
        out[at] = rng.choice(b'0123456789-{}[]",:')
    elif target.file.suffix in (".json", ".safetensors"):
        return hostile_json(target, rng)
    else:
        out[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
    return bytes(out)


def hostile_json(target: Target, rng: random.Random) -> bytes:
    """One value of the JSON (of a safetensors file: its header) replaced, removed, doubled or buried."""
    raw, data = target.whole, b""
    if target.file.suffix == ".safetensors":
        length = int.from_bytes(raw[:8], "little")
        raw, data = raw[8 : 8 + length], raw[8 + length :]
    value = json.loads(raw)
    places = list(containers(value))
    holder = rng.choice(places)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    choice = rng.randrange(12)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[str(rng.choice(list(holder)))] = holder[key]  # another key with this value: two tensors in one place
    elif choice == 2:
        text = json.dumps(value).replace(json.dumps(holder[key]), "[" * 100_000, 1)
        return text.encode() if not data else len(text).to_bytes(8, "little") + text.encode() + data
    elif isinstance(holder[key], list) and len(holder[key]) == 2 and choice < 7:  # data_offsets: [start, end]
        a, b = holder[key] if isinstance(holder[key][0], int) else (0, 1)
        holder[key] = rng.choice([[b, a], [-a, b], [a, b + 64], [a - 64, b], [a, 2**63], [0, b], [a, a]])
    else:
        holder[key] = rng.choice(VALUES)
    text = json.dumps(value).encode()
    claimed = len(text) if rng.randrange(8) else rng.choice(NUMBERS) % 2**64
    return text if target.file.suffix == ".json" else struct.pack("<Q", claimed) + text + data


def containers(value: object) -> Iterator[list | dict]:
    if isinstance(value, list | dict) and value:
        yield value
        for inner in value if isinstance(value, list) else value.values():
            yield from containers(inner)


def run(model: torch.nn.Module) -> None:
    """A model that was let in computes: nothing that its configuration says fails later."""
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))


@pytest.fixture(scope="module")
def targets(tmp_path_factory, talking_folder: Path) -> list[Target]:
    made, top = [], tmp_path_factory.mktemp("damaged")

    def copied(name: str, source: Path) -> Path:
        folder = top / name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("expected*", "inputs*", "meta*"))
        return folder

    def opened(path: Path, **options: object) -> Callable[[], None]:
        return lambda: run(load(path, dtype=torch.float32, progress=False, device="cpu", **options)[0])

    for name in sorted(p.parent.name for p in (FIXTURES / "models").glob("*/meta.json")):
        folder = copied(name, FIXTURES / "models" / name)
        made.append(Target("config.json", folder / "config.json", opened(folder)))
        if name == "llama_tied_sharded":
            made.append(Target("index of shards", folder / "model.safetensors.index.json", opened(folder)))
    for name in ("llama", "bnb4bit/nf4_double", "bnb4bit/nf4_single"):
        folder = copied(f"weights-{name.replace('/', '-')}", FIXTURES / "models" / name)
        file = folder / "model.safetensors"
        head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        what = "safetensors" if name == "llama" else "safetensors, 4 bits"
        made += [Target(what, file, opened(folder), head)] * (3 if name == "llama" else 1)
    model, tokenizer = load(talking_folder, dtype=torch.float32, progress=False)
    for kind in ("F16", "Q8_0"):
        export_gguf(model, tokenizer, top / f"{kind}.gguf", kind)
        head = (top / f"{kind}.gguf").read_bytes().index(b"rope.freq_base") + 20_000
        made += [Target("GGUF", top / f"{kind}.gguf", opened(top / f"{kind}.gguf"), head)] * 2
        made.append(Target("GGUF, kept", top / f"{kind}.gguf", opened(top / f"{kind}.gguf", quantize="keep"), head))
    folder = copied("talking", talking_folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.5}))
    for name in ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):

        def talk() -> None:
            found = load_tokenizer(folder)
            assert found.encode("a") is not None and found.policy
            if found.chat_template:
                found.apply_chat_template([{"role": "user", "content": "a"}])

        made.append(Target("tokenizer files", folder / name, talk))
    pieces = top / "tokenizer.model"
    shutil.copyfile(FIXTURES / "tokenizer" / "test_model.model", pieces)
    made.append(Target("tokenizer.model", pieces, lambda: load_tokenizer(pieces).encode("a b")))
    return made


def attack(targets: list[Target], count: int, seed: int) -> dict[str, list[int]]:
    """{kind of file: [damaged, refused]}. Any error but ours, and any file that is still open to another, is raised."""
    rng = random.Random(seed)
    table: dict[str, list[int]] = {}
    for i in range(count):
        target = targets[i % len(targets)]
        raw = damaged(target, rng)
        target.file.unlink()  # a new file: the old one may still be mapped
        target.file.write_bytes(raw)
        row = table.setdefault(target.name, [0, 0])
        row[0] += 1
        try:
            target.read()
        except OURS as error:
            row[1] += 1
            assert type(error) in OURS and len(str(error)) > 20, repr(error)
        except BaseException:
            shutil.copyfile(target.file, f"/tmp/damaged{target.file.suffix}")
            print(f"{target.name}: number {i} of seed {seed}, kept as /tmp/damaged{target.file.suffix}")
            raise
        finally:
            target.file.unlink()
            target.file.write_bytes(target.whole)
    return table


@pytest.fixture
def little_memory() -> Iterator[Callable[[], int]]:
    """Address space is limited to ROOM above what is in use. Gives the growth of the peak memory so far, in bytes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    try:
        yield lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_damaged_files(targets: list[Target], little_memory) -> None:
    table = attack(targets, 700, seed=1)
    assert all(refused > damaged / 5 for damaged, refused in table.values()), table
    assert little_memory() < 200 << 20


@pytest.mark.slow
def test_twenty_thousand_damaged_files(targets: list[Target], little_memory) -> None:
    began, table = time.perf_counter(), attack(targets, 20_000, seed=2)
    for name, (damaged_, refused) in table.items():
        print(f"{name:24} {damaged_:6} damaged {refused:6} refused")
    print(f"in {time.perf_counter() - began:.0f} s; peak memory grew by {little_memory() >> 20} MB")
    assert little_memory() < 300 << 20


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_opened(copied, tmp_path: Path) -> None:
    folder = copied("llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    for source in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"is a pickle.*torch\.load\(path, weights_only=True\).*save_file"):
            load(source, progress=False)
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "mixtral": ({"num_local_experts": 8}, "a mixture of experts"),
    "qwen2_moe": ({"num_experts": 60}, "a mixture of experts"),
    "deepseek_v3": ({"n_routed_experts": 256}, "a mixture of experts"),
    "llava": ({"vision_config": {"hidden_size": 64}, "text_config": {}}, "a multimodal model"),
    "gemma3": ({"text_config": {"model_type": "gemma3_text"}}, "a multimodal model"),
    "qwen2_audio": ({"audio_config": {"d_model": 64}}, "a multimodal model"),
    "mamba": ({}, "model_type 'mamba', which is not implemented"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name: str) -> None:
    change, message = REFUSED[name]
    raw = json.loads((FIXTURES / "models" / "llama" / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        config_from_json({**raw, "model_type": name, **change})
