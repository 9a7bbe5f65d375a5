"""``headrace infer``: what is made of the command line, and how answers look."""

import json

import ml_dtypes
import numpy as np
import pytest

from headrace.client import InferResult, ModelMetadata, TensorMetadata
from headrace.client.command import InferArguments, run
from headrace.client.command_output import describe, save, to_json
from headrace.client.command_values import (
    BadArgument,
    check_complete,
    fit_batch,
    parse_pairs,
    parse_parameter,
    read_input,
)


def model(datatype="FP32", *shape):
    return ModelMetadata("m", inputs=(TensorMetadata("x", datatype, shape or (-1, 3)),))


def result(**outputs):
    return InferResult("m", "2", "", {}, outputs)


def test_pairs_and_what_is_none():
    assert parse_pairs(["x=1", "y=a=b", "z="], "input") == {"x": "1", "y": "a=b", "z": ""}
    for wrong, said in ((["x"], "NAME=VALUE"), (["=1"], "NAME=VALUE"), (["x=1", "x=2"], "twice")):
        with pytest.raises(BadArgument, match=said):
            parse_pairs(wrong, "input")


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("0.5", 0.5), ("true", True), ("abc", "abc"), ('"5"', "5"), ("[1]", "[1]"), ("null", "null"), ("", "")],
)
def test_parameters_are_scalars(text, value):
    found = parse_parameter(text)
    assert (type(found), found) == (type(value), value)


def test_values_are_json_or_text_as_the_model_takes():
    assert read_input("x", "[[1, 2]]", model()) == [[1, 2]]
    assert read_input("x", "[1]", model("BYTES")).item() == "[1]"
    assert read_input("x", "@@home", model("BYTES")).item() == "@home"
    with pytest.raises(BadArgument, match=r"'hello' is not JSON .* takes x FP32\[-1, 3\]"):
        read_input("x", "hello", model())
    with pytest.raises(BadArgument, match=r"no input 'z'; its inputs are: x FP32"):
        read_input("z", "1", model())


def test_files(tmp_path):
    array = np.arange(3, dtype=np.int16)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "one.npz", only=array)
    np.savez(tmp_path / "two.npz", a=array, b=array + 1)
    (tmp_path / "a.json").write_text('[["a", "b"]]')
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    read = lambda text, datatype="INT16": read_input("x", f"@{tmp_path}/{text}", model(datatype))  # noqa: E731
    for text, wanted in (("a.npy", array), ("one.npz", array), ("two.npz:b", array + 1)):
        found = read(text)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, wanted)
    assert read("a.json") == [["a", "b"]]
    assert read("a.json", "BYTES").tolist() == [["a", "b"]]
    picture = read("a.jpg", "BYTES")
    assert (picture.shape, picture.item()) == ((), b"\xff\xd8")
    for text, said in (
        ("a.jpg", "only .npy, .npz and .json"),
        ("two.npz", "a, b"),
        ("two.npz:c", "a, b"),
        ("absent.npy", "No such file"),
    ):
        with pytest.raises(BadArgument, match=said):
            read(text)


def test_a_pickle_is_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(BadArgument, match="allow_pickle"):
        read_input("x", f"@{tmp_path}/a.npy", model())


@pytest.mark.parametrize(
    ("value", "shape", "batches", "wanted"),
    [
        (np.zeros(3), (-1, 3), True, (1, 3)),
        (np.zeros(3), (-1, 3), False, (3,)),
        (np.zeros((2, 3)), (-1, 3), True, (2, 3)),
        (np.zeros(3), (-1, 3, 3), True, (3,)),
        (np.zeros(3), (2, 3), True, (3,)),
        (np.array("text", object), (-1, 1), True, (1, 1)),
        (np.array("text", object), (1,), False, (1,)),
        (np.array("text", object), (-1, 2), True, ()),
        ([1, 2, 3], (-1, 3), True, (1, 3)),
        (5, (-1, 1), False, (1, 1)),
        (5, (-1,), True, (1,)),
        (5, (), True, ()),
    ],
)
def test_dimensions_are_added_only_where_nothing_else_can_be_meant(value, shape, batches, wanted):
    spec = ModelMetadata("m", inputs=(TensorMetadata("x", "FP32", shape),))
    found, note = fit_batch("x", value, spec, batches=batches)
    assert np.shape(found) == wanted
    assert (note is None) == (np.shape(value) == wanted)
    assert note is None or str(list(shape)) in note


def test_a_command_without_inputs_is_told_what_the_model_takes():
    with pytest.raises(BadArgument, match=r"--input x=\.\.\. for x FP32\[-1, 3\]"):
        check_complete({}, model())
    check_complete({}, ModelMetadata("m"))
    check_complete({"x": "1"}, model())


def test_an_answer_for_people():
    one = InferResult(
        "m",
        "2",
        "7",
        {"p": 1},
        {
            "y": np.arange(2000, dtype=np.float32).reshape(2, 1000),
            "t": np.array(["ä".encode(), b"\xff" * 9, b"x" * 500], object),
            "h": np.array([1.5], ml_dtypes.bfloat16),
            "e": np.zeros((0, 2), object),
        },
    )
    text = describe(one)
    assert text.startswith("m version 2\nid: 7\nparameter p: 1\ny  FP32[2, 1000]\n  [[")
    for said in ("t  BYTES[3]", "'ä'", "<9 bytes>", "h  BF16[1]\n  [1.5]", "e  BYTES[0, 2]"):
        assert said in text
    assert "..." in text
    assert len(text) < 1200


def test_an_answer_for_programs():
    one = result(y=np.array([[1, 2]], np.int8), t=np.array([b"a", b"\xff"], object), h=np.array([1], np.float16))
    assert json.loads(to_json(one)) == {
        "model_name": "m",
        "model_version": "2",
        "outputs": [
            {"name": "y", "datatype": "INT8", "shape": [1, 2], "data": [1, 2]},
            {"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", {"b64": "/w=="}]},
            {"name": "h", "datatype": "FP16", "shape": [1], "data": [1.0]},
        ],
    }


def test_outputs_are_saved_as_their_files_endings_say(tmp_path):
    save("y", np.array([[1, 2]], np.int8), tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").tolist() == [[1, 2]]
    save("h", np.array([1.5], ml_dtypes.bfloat16), tmp_path / "h.npy")
    assert np.load(tmp_path / "h.npy").dtype == np.float32
    save("t", np.array([[b"a"]], object), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == [["a"]]
    save("t", np.array([[b"\xff\xd8"]], object), tmp_path / "t.jpg")
    assert (tmp_path / "t.jpg").read_bytes() == b"\xff\xd8"
    for array, name, said in (
        (np.zeros(1), "y.jpg", ".npy or .json"),
        (np.array([b"a"], object), "t.npy", r"BYTES\[1\] is written to a .json"),
        (np.array([b"a", b"b"], object), "t.jpg", ".json"),
        (np.zeros(1), "absent/y.npy", "No such file"),
    ):
        with pytest.raises(BadArgument, match=said):
            save("t", array, tmp_path / name)


@pytest.mark.parametrize("output", ["y=file.npy", "y=@", "=@file", ""])
def test_wrong_outputs_are_said_before_anything_is_sent(output):
    said, aside = [], []
    arguments = InferArguments("m", (), (output,), (), "", "http://127.0.0.1:1", 1, as_json=False)
    assert run(arguments, said.append, aside.append) == 1
    assert said == []
    assert aside == [f"headrace: --output {output} is not of the form NAME or NAME=@FILE, once for each name"]
