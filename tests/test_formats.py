"""What a file is, told by its first bytes; what it states about itself, against the formats' own libraries."""

import contextlib
import io
import json
import os
import pickle
import socket
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from ai_edge_litert.schema_py_generated import ExternalBufferGroupT
from ai_edge_litert.tools import flatbuffer_utils
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tacit.devices import onnx_structure, safetensors_header, tflite_structure
from tacit.devices.formats import examine, identify, recognise
from tacit.devices.runtime import open_artifact
from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.weights import read_header, read_safetensors

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
import hostile_files as hostile

INPUTS = np.zeros((1, *hostile.SHAPE[1:]), np.float32)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def torch_saved(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


# First bytes.


@pytest.mark.parametrize(
    ("name", "content", "runtime"),
    [
        ("m.onnx", hostile.onnx_linear().SerializeToString(), "onnxruntime"),
        ("M.ONNX", hostile.onnx_quantised().SerializeToString(), "onnxruntime"),
        ("m.ort", hostile.as_ort(hostile.onnx_linear()), "onnxruntime"),
        ("m.tflite", hostile.TFLITE, "litert"),
        ("m.pte", hostile.PTE[0], "executorch"),
        ("m.pte", hostile.PTE[1], "executorch"),
    ],
)
def test_a_model_is_known_by_suffix_and_first_bytes(tmp_path, name, content, runtime):
    assert identify(write(tmp_path / name, content)) == runtime


def test_a_header_of_any_length_is_no_pickle_and_no_archive(tmp_path):
    """The first bytes of safetensors are a length: 640 begins like a pickle, others like gzip or ZIP data."""
    for length in (0x0280, 0x0580, 0x8B1F, 0x4B50):
        header = b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(length)
        path = write(tmp_path / "w.safetensors", hostile.safetensors(header=header, data=b""))
        assert recognise(path) == "safetensors"
        assert list(read_safetensors(path)) == ["w"]


def test_weights_are_no_model(tmp_path):
    with pytest.raises(ArtifactRefused, match="holds weights only"):
        identify(write(tmp_path / "w.safetensors", hostile.safetensors()))


STRANGERS = [
    (b"", "which is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer; run git lfs pull"),
    (b"\n<!DOCTYPE html><html>404</html>", "a web page; download the raw file"),
    (b"\xef\xbb\xbf<HTML><body>", "a web page"),
    (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "XML, such as a server's error message"),
    (b'{"error": "not found"}', "JSON, such as a server's error message"),
    (b"404: Not Found", "text; download"),
    (b"Bad Gateway", "text; download"),
    (pickle.dumps({"w": 1}), "a pickle; a pickle can run any code"),
    (pickle.dumps({"w": 1}, protocol=2), "a pickle;"),
    (torch_saved(zipped=False), "a pickle;"),
    (torch_saved(zipped=True), "a torch.save archive; a pickle can run any code"),
    (zipped("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl"), "a TorchScript archive;"),
    (zipped("readme.txt"), "a ZIP archive; unpack it"),
    (b"\x1f\x8b\x08" + bytes(20), "gzip data; unpack it"),
]


@pytest.mark.parametrize(("content", "what"), STRANGERS)
def test_what_is_no_model_is_refused_by_what_it_is(tmp_path, content, what):
    for suffix in (".onnx", ".ort", ".tflite", ".pte", ".safetensors", ".pt", ".bin", ""):
        with pytest.raises(ArtifactRefused) as caught:
            recognise(write(tmp_path / f"m{suffix}", content))
        assert what in str(caught.value), suffix
        assert str(caught.value).isprintable()


def test_a_pickle_is_not_unpickled_to_find_out(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in ("m.onnx", "m.pt", "m.safetensors"):
        with pytest.raises(ArtifactRefused, match="a pickle"):
            recognise(write(tmp_path / name, pickle.dumps(Bomb())))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # noqa: S301  # the control: it would have shown
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", [".onnx", ".ort", ".tflite", ".pte", ".safetensors"])
def test_one_format_under_the_name_of_another_is_refused(tmp_path, suffix):
    honest = {
        ".onnx": hostile.onnx_linear().SerializeToString(),
        ".ort": b"\0\0\0\0ORTM",
        ".tflite": hostile.TFLITE,
        ".pte": hostile.PTE[0],
        ".safetensors": hostile.safetensors(),
    }
    for other, content in honest.items():
        if other != suffix:
            with pytest.raises(ArtifactRefused, match=f"expected the content of a {suffix} file"):
                recognise(write(tmp_path / f"m{suffix}", content))


def test_binary_content_is_not_called_text_for_its_first_byte(tmp_path):
    for content in (b"<\0\0\0\xff", b"{\0\0\0\xff"):
        with pytest.raises(ArtifactRefused, match=r"expected the content of a \.onnx file"):
            recognise(write(tmp_path / "m.onnx", content))


def test_a_name_without_a_known_ending_is_refused(tmp_path):
    with pytest.raises(ArtifactRefused, match=r"ending in one of \.onnx, \.ort, \.tflite, \.pte, \.saf"):
        recognise(write(tmp_path / "m.model", hostile.TFLITE))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: os.mkfifo(path), "a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to(path.name), "a loop of symbolic links"),
    ],
)
def test_what_is_no_plain_file_is_refused_and_never_opened(tmp_path, make, what):
    """Opening a FIFO that nobody writes would wait for ever."""
    make(tmp_path / "m.onnx")
    with pytest.raises(ArtifactRefused, match=what):
        recognise(tmp_path / "m.onnx")


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket has a hundred bytes at most
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("m.onnx")
        with pytest.raises(ArtifactRefused, match="a socket"):
            recognise(tmp_path / "m.onnx")


def test_a_missing_file_is_said_to_be_missing_and_a_link_is_followed(tmp_path):
    (tmp_path / "m.onnx").symlink_to(tmp_path / "content")
    with pytest.raises(FileNotFoundError, match="expected a model file"):
        identify(tmp_path / "m.onnx")
    write(tmp_path / "content", hostile.onnx_linear().SerializeToString())
    assert identify(tmp_path / "m.onnx") == "onnxruntime"


def test_more_than_2_gib_is_refused_by_size_without_reading(tmp_path):
    path = write(tmp_path / "m.tflite", hostile.TFLITE)
    os.truncate(path, (2 << 30) - 1)
    assert identify(path) == "litert"
    os.truncate(path, 5 << 29)
    with pytest.raises(ArtifactRefused, match=r"at most 2 GiB, got path='m.tflite' of 2\.5 GiB"):
        identify(path)


# ONNX.


def tensors_of(message: object) -> list[TensorProto]:
    """The oracle: every TensorProto that protobuf's own reader finds, by reflection."""
    if isinstance(message, TensorProto):
        return [message]
    values = [value for field, value in message.ListFields() if field.type == field.TYPE_MESSAGE]
    lists = [[value] if hasattr(value, "ListFields") else list(value) for value in values]
    return [tensor for values in lists for value in values for tensor in tensors_of(value)]


def names_another_file(content: bytes) -> bool | None:
    """None where protobuf does not read it."""
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception:  # noqa: BLE001  # DecodeError of whichever implementation is installed
        return None
    return any(tensor.data_location or tensor.external_data for tensor in tensors_of(model))


def refuses(content: bytes) -> bool:
    try:
        onnx_structure.refuse_external_data(content)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("place", hostile.PLACES)
def test_a_tensor_in_another_file_is_found_wherever_it_stands(place):
    elsewhere = place(hostile.external(("location", "weights.bin"))).SerializeToString()
    with pytest.raises(ValueError, match=r"got tensor 'w' stored in 'weights\.bin'; save the model as one file"):
        onnx_structure.refuse_external_data(elsewhere)
    onnx_structure.refuse_external_data(place(numpy_helper.from_array(hostile.WEIGHTS, "w")).SerializeToString())


def test_whenever_protobuf_finds_another_file_in_a_damaged_model_so_do_we():
    tensors = (hostile.external(("location", "hard.bin")), numpy_helper.from_array(hostile.WEIGHTS[:1], "w"))
    seeds = [place(tensor).SerializeToString() for place in hostile.PLACES for tensor in tensors]
    found = {True: 0, False: 0, None: 0}
    for content in hostile.mutations(seeds, 3000, seed=7):
        verdict = names_another_file(content)
        found[verdict] += 1
        assert refuses(content) or not verdict
    assert found[True] > 300
    assert found[False] > 50


def varint(value: int) -> bytes:
    groups = [value >> shift & 127 for shift in range(0, 70, 7)]
    while len(groups) > 1 and groups[-1] == 0:
        groups.pop()
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(
    "tensor",
    [
        field(14, 1),
        field(14, 1 + (1 << 32)),  # readers that keep 32 bits see a 1
        field(14, (1 << 64) - 1),
        field(13, b"") + field(9, b"data"),
        field(14, 0) + field(14, 1),
        b"\xf0\x80\x00\x01",  # field 14 in more bytes than it needs
        varint((1 << 32 | 14) << 3) + b"\x01",  # field 14 to a reader that keeps 32 bits
        field(13, field(1, b"location") + field(2, b"\xff\0/etc/passwd")),
        field(1, b"\x02\x02") + field(8, b"w") + field(13, field(1, b"\xff\xfe")),
    ],
)
def test_a_tensor_that_readers_could_take_for_external_is_refused(tensor):
    assert refuses(field(1, 10) + field(7, field(5, tensor)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x08" + b"\xff" * 9 + b"\x7f", "at most 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "at most 64 bits"),
        (b"\x08\xff", "ends early"),
        (b"\x3a\x7f", "ends early"),
        (b"\x09\0\0\0\0\0\0\0", "ends early"),
        (b"\x0b\x0c", "wire types"),  # a group, which no reader of ONNX needs
        (b"\0\0", "field numbers"),
    ],
)
def test_bytes_that_are_no_protobuf_are_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        list(onnx_structure.fields(content, 0, len(content)))


def test_singular_fields_that_come_twice_are_all_read():
    """Protobuf merges them: the second graph adds to the first."""
    outside = field(7, field(5, field(14, 1)))
    content = hostile.onnx_linear().SerializeToString() + outside
    assert names_another_file(content)
    assert refuses(content)


def test_deep_nesting_is_refused_without_recursion():
    graph = field(5, field(8, b"w"))
    for _ in range(60):
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(ValueError, match="at most 100 nested"):
        onnx_structure.refuse_external_data(field(7, graph))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content):
    for check in (onnx_structure.refuse_external_data, onnx_structure.refuse_free_dimensions, tflite_structure.check):
        with contextlib.suppress(ValueError):
            check(content)


def test_a_free_dimension_is_refused_by_name_and_a_free_batch_is_not(tmp_path):
    assert examine(write(tmp_path / "m.onnx", hostile.onnx_linear().SerializeToString())) == "onnxruntime"
    path = write(tmp_path / "m.onnx", hostile.onnx_linear(free="height").SerializeToString())
    with pytest.raises(
        ArtifactRefused, match=r"got input 'x' with dimension 2 free \('height'\); export it with a fixed"
    ):
        examine(path)


def test_a_weight_declared_as_an_input_may_have_any_shape():
    model = hostile.onnx_linear()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ["n", "m"]))
    onnx_structure.refuse_free_dimensions(model.SerializeToString())
    model.graph.input[-1].name = "v"
    with pytest.raises(ValueError, match="got input 'v' with dimension 1 free"):
        onnx_structure.refuse_free_dimensions(model.SerializeToString())


def test_a_model_without_a_graph_is_refused(tmp_path):
    with pytest.raises(ArtifactRefused, match="without a graph"):
        examine(write(tmp_path / "m.onnx", field(1, 10)))


def test_what_onnx_checker_does_not_accept_is_refused_in_one_line(tmp_path):
    model = hostile.onnx_linear()
    model.graph.node[1].input[0] = "nobody"
    with pytest.raises(ArtifactRefused, match=r"onnx\.checker says: .*nobody") as caught:
        examine(write(tmp_path / "m.onnx", model.SerializeToString()))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_an_operator_that_nobody_knows_is_named_in_one_line(tmp_path, domain):
    model = hostile.onnx_linear()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Frobnicate", domain
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    path = write(tmp_path / "m.onnx", model.SerializeToString())
    with pytest.raises(ArtifactRefused, match="Frobnicate") as caught:
        open_artifact(path).predict(INPUTS)
    assert str(caught.value).isprintable()


# TFLite.


def changed(tmp_path: Path, change) -> Path:
    model = flatbuffer_utils.read_model(str(write(tmp_path / "m.tflite", hostile.TFLITE)))
    change(model, model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]])
    flatbuffer_utils.write_model(model, str(tmp_path / "m.tflite"))
    return tmp_path / "m.tflite"


def test_a_free_dimension_of_a_tflite_input_is_refused_and_a_free_batch_is_not(tmp_path):
    def free(*signature):
        return lambda model, tensor: setattr(tensor, "shapeSignature", list(signature))

    assert examine(changed(tmp_path, free(-1, 4, 4, 3))) == "litert"
    with pytest.raises(ArtifactRefused, match=r"got input '.*' with dimension 2 free; export it with a fixed shape"):
        examine(changed(tmp_path, free(1, 4, -1, 3)))


def test_a_tflite_model_with_buffers_in_other_files_is_refused(tmp_path):
    def add(model, tensor):
        model.externalBufferGroups = [ExternalBufferGroupT()]
        model.externalBufferGroups[0].name = b"../canary.bin"

    with pytest.raises(ArtifactRefused, match="got external buffers"):
        examine(changed(tmp_path, add))


def test_an_operator_that_litert_does_not_know_is_named_in_one_line(tmp_path):
    def rename(model, tensor):
        code = model.operatorCodes[model.subgraphs[0].operators[0].opcodeIndex]
        code.builtinCode, code.deprecatedBuiltinCode, code.customCode = 32, 32, b"Frobnicate"  # CUSTOM

    path = changed(tmp_path, rename)
    with pytest.raises(ArtifactRefused, match="Frobnicate") as caught:
        open_artifact(path, input_layout="channel_last").predict(INPUTS)
    assert str(caught.value).isprintable()


def test_a_tflite_offset_before_the_file_is_not_counted_from_its_end():
    table = struct.pack("<I4si", 8, b"TFL3", 1 << 30)
    with pytest.raises(ValueError, match="offsets inside the file"):
        tflite_structure.check(table)


# Weights.


def test_honest_weights_are_read_as_their_own_library_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    kinds = (np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.float16, np.uint32, np.int32, np.float32)
    arrays = {
        np.dtype(kind).name: rng.normal(size=(3, 2)).astype(kind) for kind in (*kinds, np.uint64, np.int64, np.float64)
    }
    arrays |= {"scalar": np.array(3, np.float32), "nothing": np.zeros((0, 4), np.float32)}
    path = write(tmp_path / "w.safetensors", safetensors.numpy.save(arrays, metadata={"order": "x"}))
    found = read_safetensors(path)
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        np.testing.assert_array_equal(found[name], values)
    assert read_header(path).metadata == {"order": "x"}


def test_whatever_we_read_of_damaged_weights_their_own_library_reads_alike():
    seeds = [hostile.safetensors(), hostile.safetensors({"w": hostile.WEIGHTS, "on": np.array([True])})]
    read = 0
    for content in hostile.mutations(seeds, 2000, seed=3):
        length = int.from_bytes(content[:8], "little")
        if not 2 <= length <= len(content) - 8:
            continue
        try:
            answer = safetensors_header.parse(content[8 : 8 + length], len(content) - 8 - length)
        except ValueError:
            continue
        theirs = dict(safetensors.deserialize(content))
        assert {name: [theirs[name]["dtype"], theirs[name]["shape"]] for name in theirs} == {
            name: [dtype, shape] for name, dtype, shape, _ in answer["tensors"]
        }
        for name, _, _, begin in answer["tensors"]:
            start = answer["data_start"] + begin
            assert bytes(theirs[name]["data"]) == content[start : start + len(theirs[name]["data"])]
        read += 1
    assert read > 20


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (
            b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2),
            bytes(8),
            "expected each name once, got 'w' twice",
        ),
        (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "got 'a' twice"),
        (b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "got 'dtype' twice"),
        (json.dumps({"w": entry()}).encode(), bytes(7), "expected 8 bytes of data, got 7"),
        (json.dumps({"w": entry()}).encode(), bytes(9), "expected 8 bytes of data, got 9"),
        (json.dumps({"v": entry(), "w": entry(offsets=(4, 12))}).encode(), bytes(12), "overlap or gap"),
        (json.dumps({"v": entry(), "w": entry(offsets=(12, 20))}).encode(), bytes(20), "overlap or gap"),
        (json.dumps({"v": entry(), "w": entry()}).encode(), bytes(8), "overlap or gap"),
        (json.dumps({"w": entry(shape=(3,))}).encode(), bytes(8), "as many bytes as tensor 'w' has"),
        (json.dumps({"w": entry(offsets=(8, 0))}).encode(), bytes(8), "as many bytes as tensor 'w' has"),
        (json.dumps({"w": entry(offsets=(-8, 0))}).encode(), bytes(8), "whole numbers"),
        (json.dumps({"w": entry(shape=(2.0,))}).encode(), bytes(8), "whole numbers"),
        (json.dumps({"w": entry(shape=(True, 2))}).encode(), bytes(8), "whole numbers"),
        (json.dumps({"w": entry(shape=(2**63, 0), offsets=(0, 0))}).encode(), b"", "whole numbers"),
        (json.dumps({"w": entry(shape=(2**62, 0), offsets=(0, 0))}).encode(), b"", "that memory can hold"),
        (json.dumps({"w": entry(shape=[1] * 40 + [2])}).encode(), bytes(8), "whole numbers"),
        (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8), "got NaN"),
        (json.dumps({"w": entry(dtype="O")}).encode(), bytes(8), "known dtype"),
        (json.dumps({"w": {**entry(), "more": 1}}).encode(), bytes(8), "data_offsets of tensor 'w', got others"),
        (json.dumps({"w": 3}).encode(), b"", "data_offsets of tensor 'w', got others"),
        (json.dumps({"__metadata__": {"a": 1}}).encode(), b"", "__metadata__ of texts"),
        (b"[1]".ljust(8), b"", "JSON|begins with a brace|content of a .safetensors"),
        (b'{"w": ' + b"[" * 100_000, b"", "deeply nested"),
        (b'{"w": ' + b"1" * 5_000 + b"}", b"", "Exceeds the limit"),
        (b'{"\xff": 1}', b"", "utf-8"),
        (json.dumps({"w": entry()}).encode(), np.float32([1, np.nan]).tobytes(), "NaN or infinity in 'w'"),
        (json.dumps({"w": entry()}).encode(), np.float32([1, -np.inf]).tobytes(), "NaN or infinity in 'w'"),
        (
            json.dumps({"w": entry("F16", (1,), (0, 2))}).encode(),
            np.float16([np.inf]).tobytes(),
            "NaN or infinity in 'w'",
        ),
        (json.dumps({"w": entry("BF16", (4,))}).encode(), bytes(8), "'w' of 'w.safetensors' as BF16"),
        (json.dumps({"w": entry("BOOL", (2,), (0, 2))}).encode(), b"\1\2", "true or false"),
    ],
)
def test_hostile_weights_are_refused_in_one_line(tmp_path, header, data, reason):
    path = write(tmp_path / "w.safetensors", hostile.safetensors(header=header, data=data))
    with pytest.raises(ArtifactRefused, match=reason) as caught:
        read_safetensors(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("length", [0, 1, 61, 2**31, 2**47, 2**63, 2**64 - 1])
def test_a_header_that_does_not_fit_is_not_read(tmp_path, length):
    content = length.to_bytes(8, "little") + hostile.safetensors()[8:60]
    with pytest.raises(ArtifactRefused, match=r"expected a header of 2 to|expected the content of"):
        read_header(write(tmp_path / "w.safetensors", content))


def test_a_header_that_would_fill_the_memory_is_refused_by_its_size(tmp_path):
    header = b'{"w":{' + b" " * (safetensors_header.MAX_HEADER_BYTES)
    path = write(tmp_path / "w.safetensors", hostile.safetensors(header=header, data=b""))
    with pytest.raises(ArtifactRefused, match="expected a header of 2 to 8388608 bytes"):
        read_header(path)


def test_nothing_of_a_refused_file_is_returned_or_left(tmp_path):
    path = write(tmp_path / "w.safetensors", hostile.safetensors({"w": np.float32([np.nan])}))
    with pytest.raises(ArtifactRefused):
        read_safetensors(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
