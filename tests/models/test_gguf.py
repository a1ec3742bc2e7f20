"""GGUF: every format against the gguf package, a whole model there and back, damaged and hostile files."""

import random
import struct
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.checkpoint import GGUFCheckpoint, open_checkpoint, unpermuted
from lowrank.models.families import gguf_name
from lowrank.models.gguf import FORMATS, GGUF
from lowrank.models.load import load
from lowrank.quant.linear import QuantizedLinear

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
KINDS = {name: gguf.GGMLQuantizationType[name] for name in (f.name for f in FORMATS.values())}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], metadata: dict[str, object]) -> Path:
    """A GGUF file by the gguf package; tensors are fp32 arrays and the format to store them in, or raw blocks."""
    writer = gguf.GGUFWriter(str(path), str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    for name, (values, kind) in tensors.items():
        raw = values if values.dtype == np.uint8 else gguf.quants.quantize(values, KINDS[kind])
        writer.add_tensor(name, raw, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", KINDS)
def test_each_format_decodes_as_the_gguf_package_does(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    format = next(f for f in FORMATS.values() if f.name == name)
    if name in ("F32", "F16", "BF16"):
        raw = gguf.quants.quantize(rng.standard_normal((6, 256)).astype(np.float32), KINDS[name])
    else:  # any bytes are a valid block, as long as its fp16 scales are numbers
        raw = rng.integers(0, 256, (6, 1024 // format.block * format.size), dtype=np.uint8)
        raw = np.where(raw.view(np.uint8) >= 0x7C, raw & 0x3B, raw)
    file = GGUF(write(tmp_path / "x.gguf", {"a": (raw, name)}, {"general.architecture": "llama", "n": 3}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = gguf.quants.dequantize(raw, KINDS[name])
    torch.testing.assert_close(file.tensor("a"), torch.from_numpy(wanted.copy()), rtol=0, atol=0, equal_nan=True)
    half = file.tensor("a", torch.bfloat16)
    torch.testing.assert_close(half, file.tensor("a").to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def llama_as_gguf(path: Path, folder: str = "llama_tied_sharded", kind: str = "F32") -> Path:
    """A Llama folder as llama.cpp's converter writes it: rows of q and k permuted."""
    source = open_checkpoint(MODELS / folder)
    config = source.config
    model, _ = load(MODELS / folder, dtype=torch.float32, device="cpu", progress=False)
    tensors = {}
    for name, p in model.named_parameters():
        value = p.detach()
        if name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.n_heads if "q_proj" in name else config.n_kv_heads
            value = value[unpermuted(len(value), heads).argsort()]
        stored = kind if value.dim() == 2 and value.shape[1] % 32 == 0 else "F32"
        tensors[gguf_name(config, name)] = (value.numpy().astype(np.float32), stored)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config.n_layers,
        "llama.embedding_length": config.dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.context_length": config.max_positions,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }
    return write(path, tensors, metadata)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_model_as_gguf_is_the_model_of_the_folder(tmp_path: Path, kind: str) -> None:
    folder, _ = load(MODELS / "llama_tied_sharded", dtype=torch.float32, device="cpu", progress=False)
    file, tokenizer = load(
        llama_as_gguf(tmp_path / "m.gguf", kind=kind), dtype=torch.float32, device="cpu", progress=False
    )
    assert file.config == folder.config and tokenizer is None
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(file(ids), folder(ids), atol=1e-6 if kind == "F32" else 0.5, rtol=0)


def test_a_folder_with_one_gguf_file(tmp_path: Path) -> None:
    llama_as_gguf(tmp_path / "m.gguf")
    assert isinstance(open_checkpoint(tmp_path), GGUFCheckpoint)
    (tmp_path / "n.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    with pytest.raises(ValueError, match=r"2 GGUF files.*m\.gguf, n\.gguf"):
        open_checkpoint(tmp_path)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"a": (np.zeros((2, 32), np.float32), "F32")}, {"general.architecture": "lama"})
    with pytest.raises(ConfigError, match=r"'lama'.*did you mean 'llama'.*known: .*qwen3"):
        load(path, progress=False)


def test_missing_and_wrong_tensors(tmp_path: Path) -> None:
    whole = GGUF(llama_as_gguf(tmp_path / "m.gguf"))
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    name = b"blk.1.ffn_up.weight"
    at = raw.index(name)
    raw[at : at + len(name)] = b"blk.1.ffn_xp.weight"
    (tmp_path / "renamed.gguf").write_bytes(raw)
    with pytest.raises(FileFormatError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight \[112, 64\]"):
        load(tmp_path / "renamed.gguf", progress=False)
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    at = raw.index(name) + len(name) + 4  # its two dimensions, 64 x 112
    raw[at : at + 16] = struct.pack("<QQ", 112, 64)
    (tmp_path / "turned.gguf").write_bytes(raw)
    with pytest.raises(
        FileFormatError, match=r"up_proj\.weight is \[64, 112\], its configuration asks for \[112, 64\]"
    ):
        load(tmp_path / "turned.gguf", progress=False)
    assert len(whole.tensors) == 29


def header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "empty": b"",
    "no magic": b"GGML" + bytes(60),
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0) + bytes(8),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8),
    "2^63 tensors": header(1 << 63, 0),
    "2^63 keys": header(0, 1 << 63),
    "huge string": header(0, 1, struct.pack("<Q", 1 << 62) + b"abc" + bytes(20)),
    "huge array": header(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 5, 1 << 61) + bytes(20)),
    "unknown value type": header(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77) + bytes(20)),
    "deep arrays": header(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "9 dimensions": header(1, 0, tensor(b"a", [1] * 9, 0, 0) + bytes(64)),
    "2^62 x 2^62 values": header(1, 0, tensor(b"a", [1 << 62, 1 << 62], 0, 0) + bytes(64)),
    "empty dimension": header(1, 0, tensor(b"a", [0, 1 << 62], 0, 0) + bytes(64)),
    "offset behind the end": header(1, 0, tensor(b"a", [4], 0, 1 << 63) + bytes(64)),
    "unaligned offset": header(1, 0, tensor(b"a", [4], 0, 7) + bytes(64)),
    "ragged block": header(1, 0, tensor(b"a", [31], 2, 0) + bytes(64)),
    "unknown format": header(1, 0, tensor(b"a", [32], 200, 0) + bytes(64)),
    "twice the same name": header(2, 0, tensor(b"a", [4], 0, 0) + tensor(b"a", [4], 0, 32) + bytes(96)),
    "overlap": header(2, 0, tensor(b"a", [16], 0, 0) + tensor(b"b", [16], 0, 32) + bytes(160)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers(tmp_path: Path, what: str) -> None:
    (tmp_path / "x.gguf").write_bytes(HOSTILE[what])
    with pytest.raises(FileFormatError, match=r"x\.gguf"):
        GGUF(tmp_path / "x.gguf")


def test_alignment_zero(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.gguf",
        {"a": (np.zeros((2, 32), np.float32), "F32")},
        {"general.architecture": "llama", "x.alignmentxxxxxxx": 7},
    )
    raw = path.read_bytes().replace(b"x.alignmentxxxxxxx", b"general.alignment\0", 1)
    path.write_bytes(
        raw.replace(struct.pack("<Q", 18) + b"general.alignment\0", struct.pack("<Q", 17) + b"general.alignment", 1)
    )
    with pytest.raises(FileFormatError, match="alignment is 7"):
        GGUF(path)


def test_damaged_files_give_a_clear_error_or_load(tmp_path: Path) -> None:
    """Truncations and flipped bits: our errors and nothing else, and never a tensor behind the file's end."""
    whole = llama_as_gguf(tmp_path / "m.gguf").read_bytes()
    rng, refused = random.Random(0), 0
    for i in range(300):
        raw = bytearray(whole)
        if i % 3 == 0:
            del raw[rng.randrange(len(raw)) :]
        for _ in range(rng.randrange(1, 4)):  # most of the header, some of the data
            if raw:
                raw[rng.randrange(min(len(raw), 2600))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.gguf").write_bytes(raw)
        try:
            load(tmp_path / "x.gguf", progress=False)
        except (FileFormatError, ConfigError, ValueError) as error:
            assert "x.gguf" in str(error), error
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_kept_blocks_are_the_file_s_values_exactly(tmp_path: Path, kind: str) -> None:
    path = llama_as_gguf(tmp_path / "m.gguf", kind=kind)
    dense, _ = load(path, dtype=torch.float32, device="cpu", progress=False)
    kept, _ = load(path, quantize="keep", dtype=torch.float32, device="cpu", progress=False)
    layers = {name: m for name, m in kept.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 3 * 6  # down_proj's rows of 112 are no whole blocks and stay dense
    for name, layer in layers.items():
        q = layer.quantized
        assert q.block_size == 32 and q.scales.dtype == torch.float16
        assert torch.equal(q.dequantize(torch.float32), dense.get_submodule(name).weight), name
