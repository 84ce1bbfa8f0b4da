"""A model folder seen through its headers: what safetensors reads we read, what is damaged is refused with its name.

python -m pytest tests/models/test_checkpoints.py
"""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.refusals import refused
from tests.tiny_checkpoints import resave, save_tiny
from tests.tiny_pairs import contents
from utils.errors import UserError
from utils.models.checkpoints import (
    Checkpoint,
    find_small_files,
    hub_commit,
    is_local,
    read_model_config,
    weight_file_record,
)
from utils.models.headers import DTYPE_BYTES, INDEX, MOST_TENSORS, SINGLE, file_headers, header_hash, read_headers
from utils.models.opening import open_checkpoint, open_without_download

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
TABLE = {
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]},
}


def packed(table: object, data: bytes | None = None, pad: int = 0) -> bytes:
    """A safetensors file with this header; zeros for data unless given."""
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    header += b" " * pad
    if data is None:
        data = bytes(max((e["data_offsets"][1] for e in table.values() if "data_offsets" in e), default=0))
    return struct.pack("<Q", len(header)) + header + data


def model(folder: Path, weights: dict[str, bytes] | None = None, config: object = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    for name, content in ({SINGLE: packed(TABLE)} if weights is None else weights).items():
        (folder / name).write_bytes(content)
    return folder


def index_of(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def refusal(code: str, folder: Path, **kwargs) -> str:
    before = contents(folder) if folder.is_dir() else None
    with refused(code) as caught:
        open_checkpoint(str(folder), **kwargs)
    assert before is None or contents(folder) == before
    message = str(caught.value)
    assert message.startswith("model ") and str(folder) in message and len(message) < 1000
    return message


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = resave(save_tiny("llama", tmp_path_factory.mktemp("sharded"), layers=2), "20KB")
    assert (folder / INDEX).exists() and not (folder / SINGLE).exists()
    return folder


def test_headers_agree_with_the_safetensors_library(sharded):
    from safetensors import safe_open

    checkpoint = open_checkpoint(str(sharded))
    found = {}
    for file in sorted(sharded.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype(), file)
    assert {name: (h.shape, h.dtype, h.file) for name, h in checkpoint.tensors.items()} == found
    assert len(checkpoint.files) > 2
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.total_bytes == json.loads((sharded / INDEX).read_text())["metadata"]["total_size"]


def test_offsets_point_at_the_bytes(sharded):
    import torch
    from safetensors.torch import load_file

    for header in open_checkpoint(str(sharded)).tensors.values():
        raw = header.file.read_bytes()[header.start : header.start + header.nbytes]
        expected = load_file(header.file)[header.name]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=expected.dtype).reshape(expected.shape), expected)


def test_the_dtype_of_most_bytes_counts(tmp_path):
    assert open_checkpoint(str(model(tmp_path / "a"))).float_dtype == "float32"
    table = {**TABLE, "c": {"dtype": "BF16", "shape": [3], "data_offsets": [28, 34]}}
    assert open_checkpoint(str(model(tmp_path / "b", {SINGLE: packed(table)}))).float_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "U8", "BOOL"])
def test_weights_that_are_mostly_no_floats_are_quantized(tmp_path, dtype):
    table = {"a": {"dtype": dtype, "shape": [40], "data_offsets": [0, 40]}}
    with refused("model-quantized"):
        _ = open_checkpoint(str(model(tmp_path / "m", {SINGLE: packed(table)}))).float_dtype


def test_links_into_a_cache_are_followed(tmp_path):
    """The hub cache keeps contents in `blobs` and links to them from `snapshots/<commit>`."""
    blobs = model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    checkpoint = open_checkpoint(str(snapshot))
    assert set(checkpoint.tensors) == {"a", "b"}
    assert weight_file_record(checkpoint)["revision"] == "0123abc"
    assert hub_commit(blobs) is None


def test_tensors_that_the_index_does_not_name_are_left_out(tmp_path):
    files = {"one.safetensors": packed(TABLE), "two.safetensors": packed(TABLE), "extra.safetensors": packed(TABLE)}
    index = index_of({"a": "one.safetensors", "b": "two.safetensors"})
    checkpoint = open_checkpoint(str(model(tmp_path / "m", {**files, INDEX: index})))
    assert {name: header.file.name for name, header in checkpoint.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_the_record_changes_with_the_weights(tmp_path):
    first = weight_file_record(open_checkpoint(str(model(tmp_path / "m"))))
    again = weight_file_record(open_checkpoint(str(tmp_path / "m")))
    assert first == again and json.loads(json.dumps(first)) == first
    other = {"a": TABLE["a"], "b": {**TABLE["b"], "shape": [2, 2]}}
    second = weight_file_record(open_checkpoint(str(model(tmp_path / "m", {SINGLE: packed(other)}))))
    assert first["header_sha256"] != second["header_sha256"]


def test_the_header_hash_ignores_the_order(tmp_path):
    headers = list(read_headers(model(tmp_path / "m"), "m").values())
    assert header_hash(headers) == header_hash(headers[::-1])


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("./m", True), ("/m", True), ("~/m", True), ("..", True), ("a/b/c", True), ("C:\\models\\m", True),
        ("google/gemma-2-2b", False), ("gpt2", False), ("there", True), ("$HOME/m", False), ("x" * 5000, False),
    ],
)  # fmt: skip
def test_what_counts_as_local(tmp_path, monkeypatch, name, local):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert is_local(name) is local


def test_open_without_download(tmp_path):
    folder = str(model(tmp_path / "m"))
    assert isinstance(open_without_download(folder), Checkpoint)
    assert open_without_download(str(tmp_path / "none")) is None
    assert open_without_download("nobody/nothing-like-this") is None


# --- model folders that are none --------------------------------------------------------------------------------------


def test_missing_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for name, code in {
        "./none": "model-missing",
        "./loop": "model-missing",
        "file": "model-is-file",
        "~no_such_user/m": "model-missing",
    }.items():
        with refused(code):
            find_small_files(name)
    model(tmp_path / "m")
    with refused("model-revision"):
        find_small_files("./m", "main")


GGUF = b"GGUF\x03\0\0\0" + bytes(64)
PICKLE = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94"
FOLDERS = {
    "no config": ({}, None, "model-no-config"),
    "weights without a config": (None, None, "model-no-config"),
    "only GGUF, no config": ({"m.gguf": GGUF}, None, "model-format"),
    "only GGUF": ({"m.gguf": GGUF}, CONFIG, "model-format"),
    "only pickles": ({"pytorch_model.bin": PICKLE}, CONFIG, "model-format"),
    "pickles and GGUF": ({"x.pth": PICKLE, "m.gguf": GGUF}, CONFIG, "model-format"),
    "an adapter": ({"adapter_config.json": b"{}", "adapter_model.safetensors": packed(TABLE)}, None, "adapter-no-model"),
    "an adapter with a config": ({"adapter_config.json": b"{}", "adapter_model.safetensors": packed(TABLE)}, CONFIG, "adapter-no-model"),
    "another file name": ({"weights.safetensors": packed(TABLE)}, CONFIG, "model-format"),
    "shards without an index": ({"model-00001-of-00002.safetensors": packed(TABLE)}, CONFIG, "model-format"),
    "no weights": ({}, CONFIG, "model-no-weights"),
    "no tensors": ({SINGLE: packed({})}, CONFIG, "model-no-tensors"),
    "a stale single file": ({SINGLE: packed(TABLE), INDEX: index_of({"a": SINGLE})}, CONFIG, "model-two-weights"),
    # config.json
    "config is not JSON": (None, b"{", "json-invalid"),
    "config is a list": (None, b"[]", "json-no-object"),
    "config is not UTF-8": (None, b"\xff\xfe", "json-invalid"),
    "config is nested too deeply": (None, b"[" * 100_000, "json-invalid"),
    "no architecture": (None, {"model_type": "llama"}, "model-no-architecture"),
    "architectures null": (None, {"architectures": None}, "model-no-architecture"),
    "architectures empty": (None, {"architectures": []}, "model-no-architecture"),
    "architectures numbers": (None, {"architectures": [1]}, "model-no-architecture"),
    "encoder-decoder": (None, {**CONFIG, "is_encoder_decoder": True}, "model-encoder-decoder"),
    "quantized": (None, {**CONFIG, "quantization_config": {"quant_method": "gptq"}}, "model-quantized"),
    "quantized somehow": (None, {**CONFIG, "quantization_config": {"bits": 4}}, "model-quantized"),
    "quantized as text": (None, {**CONFIG, "quantization_config": "fp8"}, "model-quantized"),
    # the index
    "index is not JSON": ({INDEX: b"{,"}, CONFIG, "json-invalid"),
    "index without a map": ({INDEX: b"{}"}, CONFIG, "model-index-damaged"),
    "index with an empty map": ({INDEX: index_of({})}, CONFIG, "model-index-damaged"),
    "index with a list": ({INDEX: index_of(["a"])}, CONFIG, "model-index-damaged"),
    "index names a missing shard": ({INDEX: index_of({"a": "x.safetensors"})}, CONFIG, "model-shard-missing"),
    "index names a missing tensor": ({"x.safetensors": packed(TABLE), INDEX: index_of({"zz": "x.safetensors"})}, CONFIG, "model-index-wrong"),
    "two shards with one tensor": ({"x.safetensors": packed(TABLE), "y.safetensors": packed(TABLE, bytes(range(28))), INDEX: index_of({"a": "x.safetensors", "b": "y.safetensors"})}, CONFIG, "model-tensor-twice"),
    "index leads out of the folder": ({INDEX: index_of({"a": "../x.safetensors"})}, CONFIG, "model-index-outside"),
    "index names an absolute path": ({INDEX: index_of({"a": "/etc/passwd"})}, CONFIG, "model-index-outside"),
    "index names the parent": ({INDEX: index_of({"a": ".."})}, CONFIG, "model-index-outside"),
    "index names nothing": ({INDEX: index_of({"a": ""})}, CONFIG, "model-index-outside"),
    "index names a NUL": ({INDEX: index_of({"a": "x\0y"})}, CONFIG, "model-index-outside"),
    "index names half a character": ({INDEX: index_of({"a": "x\ud800"})}, CONFIG, "json-invalid"),
    "index names a very long file": ({INDEX: index_of({"a": "x" * 300})}, CONFIG, "model-shard-missing"),
    "index names a number": ({INDEX: index_of({"a": 5})}, CONFIG, "model-shard-missing"),
    "index names null": ({INDEX: index_of({"a": None})}, CONFIG, "model-shard-missing"),
    # a weight file
    "zero bytes": ({SINGLE: b""}, CONFIG, "weights-truncated"),
    "a few bytes": ({SINGLE: b"1234567"}, CONFIG, "weights-truncated"),
    "a header of 100 GB": ({SINGLE: struct.pack("<Q", 100 * 2**30) + bytes(100)}, CONFIG, "weights-truncated"),
    "a header of all bits": ({SINGLE: b"\xff" * 100}, CONFIG, "weights-truncated"),
    "a truncated header": ({SINGLE: packed(TABLE)[:40]}, CONFIG, "weights-truncated"),
    "truncated data": ({SINGLE: packed(TABLE)[:-1]}, CONFIG, "weights-truncated"),
    "trailing bytes": ({SINGLE: packed(TABLE) + b"x"}, CONFIG, "weights-damaged"),
    "a pickle of that name": ({SINGLE: PICKLE + bytes(100)}, CONFIG, "weights-truncated"),
    "an LFS pointer": ({SINGLE: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"}, CONFIG, "weights-truncated"),
    "a header that is a list": ({SINGLE: packed(b"[]", b"")}, CONFIG, "weights-damaged"),
    "a header that is no JSON": ({SINGLE: packed(b"{x}", b"")}, CONFIG, "weights-damaged"),
    "a header that is no UTF-8": ({SINGLE: packed(b'{"\xff": 1}', b"")}, CONFIG, "weights-damaged"),
    "a header nested too deeply": ({SINGLE: packed(b"[" * 100_000, b"")}, CONFIG, "weights-damaged"),
    "overlapping tensors": ({SINGLE: packed({**TABLE, "c": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}})}, CONFIG, "weights-damaged"),
    "a gap": ({SINGLE: packed({"a": TABLE["a"], "b": {**TABLE["b"], "data_offsets": [13, 29]}})}, CONFIG, "weights-damaged"),
    "a tensor twice": ({SINGLE: packed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x")}, CONFIG, "weights-damaged"),
    "a shape that does not fit": ({SINGLE: packed({"a": {**TABLE["a"], "shape": [2, 4]}})}, CONFIG, "weights-damaged"),
    "a shape that does not fit complex numbers": ({SINGLE: packed({"a": {**TABLE["a"], "dtype": "C64"}})}, CONFIG, "weights-damaged"),
    "a negative shape": ({SINGLE: packed({"a": {**TABLE["a"], "shape": [-2, -3]}})}, CONFIG, "weights-damaged"),
    "a shape of a fraction": ({SINGLE: packed({"a": {**TABLE["a"], "shape": [2, 3.5]}})}, CONFIG, "weights-damaged"),
    "a shape of infinity": ({SINGLE: packed({"a": {**TABLE["a"], "shape": [2, float("inf")]}})}, CONFIG, "weights-damaged"),
    "a shape of very many axes": ({SINGLE: packed({"a": {**TABLE["a"], "shape": [10**18] * 5000}})}, CONFIG, "weights-damaged"),
    "offsets the wrong way": ({SINGLE: packed({"a": {**TABLE["a"], "data_offsets": [12, 0]}}, bytes(12))}, CONFIG, "weights-damaged"),
    "offsets as text": ({SINGLE: packed({"a": {**TABLE["a"], "data_offsets": "12"}}, bytes(12))}, CONFIG, "weights-damaged"),
    "one offset": ({SINGLE: packed({"a": {**TABLE["a"], "data_offsets": [12]}}, bytes(12))}, CONFIG, "weights-damaged"),
    "no dtype": ({SINGLE: packed({"a": {"shape": [1], "data_offsets": [0, 4]}})}, CONFIG, "weights-damaged"),
    "dtype a list": ({SINGLE: packed({"a": {**TABLE["a"], "dtype": []}})}, CONFIG, "weights-damaged"),
    "an entry that is a number": ({SINGLE: packed(b'{"a": 1}', b"")}, CONFIG, "weights-damaged"),
    "far too many tensors": ({SINGLE: packed(b"{" + b",".join(b'"%d":{}' % number for number in range(MOST_TENSORS + 1)) + b"}", b"")}, CONFIG, "weights-too-many"),
    "a name of half a character": ({SINGLE: packed({"a\ud800": TABLE["a"]})}, CONFIG, "weights-damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_refused_from_names_and_headers(tmp_path, case):
    weights, config, code = FOLDERS[case]
    refusal(code, model(tmp_path / "m", weights, config))


WORDING = {
    "no config": "model PATH: PATH has no config.json; is it a model folder?",
    "only GGUF": "model PATH: no model.safetensors and no model.safetensors.index.json, only m.gguf; give the checkpoint "
    "that the GGUF file was made from",
    "another file name": "model PATH: no model.safetensors and no model.safetensors.index.json, only weights.safetensors; "
    "a sharded model needs its model.safetensors.index.json, a single file must be called model.safetensors",
    "an adapter": "model PATH is a LoRA adapter whose adapter_config.json names no model (base_model_name_or_path); write model+PATH",
    "config is a list": "model PATH: config.json must hold a JSON object, but holds a list",
    "quantized": "model PATH is quantized (gptq); give the unquantized checkpoint",
    "encoder-decoder": "model PATH is an encoder-decoder (LlamaForCausalLM); only decoders are supported",
    "index names a missing shard": "model PATH: model.safetensors.index.json names x.safetensors, which is missing from "
    "PATH",
    "index names a missing tensor": "model PATH: model.safetensors.index.json lists zz in x.safetensors, but it is not "
    "there",
    "index names the parent": "model PATH: model.safetensors.index.json names '..', which is not a plain file name in the "
    "folder",
    "a gap": "model PATH: model.safetensors: tensor b overlaps another or leaves a gap; the file is damaged",
    "truncated data": "model PATH: model.safetensors is truncated: 164 bytes where its header says 165; copy or download "
    "it again",
}


@pytest.mark.parametrize("case", WORDING)
def test_what_a_message_says(tmp_path, case):
    weights, config, code = FOLDERS[case]
    said = refusal(code, model(tmp_path / "m", weights, config))
    assert said == WORDING[case].replace("PATH", str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX])
def test_links_that_lead_nowhere_and_folders_in_place_of_files(tmp_path, name):
    for kind in ("loop", "folder"):
        folder = model(tmp_path / kind, {SINGLE: packed(TABLE)} if name != INDEX else {})
        (folder / name).unlink(missing_ok=True)
        if kind == "loop":
            (folder / name).symlink_to(name)
        else:
            (folder / name).mkdir()
        with pytest.raises(UserError) as caught:
            open_checkpoint(str(folder))
        assert name in str(caught.value) or "config.json" in str(caught.value)


def test_a_shard_that_is_a_folder(tmp_path):
    folder = model(tmp_path / "m", {INDEX: index_of({"a": "x.safetensors"})})
    (folder / "x.safetensors").mkdir()
    assert "x.safetensors is no regular file" in refusal("weights-missing", folder)


def test_no_weight_bytes_are_read(tmp_path):
    """A file of 1 TB (sparse) is checked at once: only its header is looked at."""
    size = 2**40
    table = {"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    folder = model(tmp_path / "m", {SINGLE: packed(table, b"")})
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size + size)
    assert open_checkpoint(str(folder)).total_bytes == size


# --- fuzz -------------------------------------------------------------------------------------------------------------


def check_file(path: Path, content: bytes) -> None:
    """Our reader refuses with a `UserError`, or the safetensors library reads the same."""
    from safetensors import SafetensorError, safe_open

    path.write_bytes(content)
    try:
        headers = {header.name: header for header in file_headers(path, "m")}
    except UserError as error:
        assert len(str(error)) < 5000
        return
    if not {header.dtype for header in headers.values()} <= set(DTYPE_BYTES):
        return  # a dtype of the future: not ours to judge, unless it is measured
    try:
        with safe_open(path, framework="np") as opened:
            assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {  # noqa: SIM118
                name: header.shape for name, header in headers.items()
            }
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we accept: {error}")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_fuzz_mutated_weight_file(tmp_path_factory, data):
    content = bytearray(packed(TABLE, pad=2))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.binary(max_size=2) | st.sampled_from([b"-", b"1", b"9", b"0", b'"', b",", b"[", b"}", b"e"])
        )
        content[at : at + data.draw(st.integers(0, 2))] = piece
    check_file(tmp_path_factory.getbasetemp() / "fuzz.safetensors", bytes(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 40) | st.floats() | st.sampled_from(["F32", "BF16", "U8", "", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    where=st.sampled_from(
        [(), ("a",), ("a", "dtype"), ("a", "shape"), ("a", "data_offsets"), ("__metadata__",), ("c",)]
    ),
    junk=JSON,
    size=st.integers(0, 40),
)
@example(where=("__metadata__",), junk={"x": 1}, size=28)
@example(where=("__metadata__",), junk=None, size=28)
@example(where=("__metadata__",), junk=[], size=28)
def test_fuzz_header_values(tmp_path_factory, where, junk, size):
    table = json.loads(json.dumps(TABLE))
    if not where:
        table = junk
    elif len(where) == 1:
        table[where[0]] = junk
    else:
        table[where[0]][where[1]] = junk
    check_file(tmp_path_factory.getbasetemp() / "fuzz.safetensors", packed(json.dumps(table).encode(), bytes(size)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzz_mutated_index_and_config(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    model(folder, {"x.safetensors": packed(TABLE), INDEX: index_of({"a": "x.safetensors", "b": "x.safetensors"})})
    path = folder / data.draw(st.sampled_from([INDEX, "config.json"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(max_size=2) | st.sampled_from([b"null", b"[]", b"{}", b"1", b'"', b"..", b"/"]))
        content[at : at + data.draw(st.integers(0, 4))] = piece
    path.write_bytes(bytes(content))
    try:
        assert open_checkpoint(str(folder)).tensors
    except UserError as error:
        assert len(str(error)) < 5000


def test_read_model_config_returns_what_is_there(tmp_path):
    assert read_model_config(model(tmp_path / "m"), "m") == CONFIG
