"""What is found in a model repository, however odd."""

import inspect
import os
import sys
from pathlib import Path

import pytest

from headrace.core.fingerprint import fingerprint
from headrace.repository import layout
from headrace.repository.layout import list_models, read_folder, selected_versions
from headrace.repository.model_config import parse_config


@pytest.fixture
def model(tmp_path):
    """Writes files of the model "m" and gives its folder."""

    def write(**files):
        folder = tmp_path / "m"
        for place, content in files.items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return write


def files(*places):
    return dict.fromkeys(places, "x")


# ---- models of a repository ----


def test_list_models(tmp_path):
    for folder in (
        "b/1", "a/config", ".hidden/1", "__pycache__/1", "copying.tmp/1", "copying.part/1", "old~/1", "docs/images",
        "zero/0", "padded/01", "word/1a", "with space/2", "ünï/7",
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a" / "config.yaml").write_text("")
    (tmp_path / "pb").mkdir()
    (tmp_path / "pb" / "config.pbtxt").write_text("")
    (tmp_path / "5").write_text("a plain file")
    (tmp_path / "number_is_a_file").mkdir()
    (tmp_path / "number_is_a_file" / "1").write_text("")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert list_models(tmp_path) == ["a", "b", "dangling", "linked", "pb", "with space", "ünï"]


def test_list_models_passes_over_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff") / "1").mkdir(parents=True)
    assert list_models(tmp_path) == []


def test_a_repository_that_cannot_be_read_is_not_empty(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_models(tmp_path / "nowhere")


# ---- one model ----


def test_a_single_file_is_a_model(model):
    folder = read_folder(model(**{"1/model.onnx": b"12345"}))
    assert folder.name == "m"
    assert folder.problems == ()
    assert folder.on_disk == {1}
    version = folder.versions[1]
    assert (version.version, version.backend, version.model_bytes) == (1, "onnxruntime", 5)
    assert version.model_path == folder.path / "1" / "model.onnx"
    assert selected_versions(folder) == [1]


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (["1/a.onnx", "1/\udcff.onnx"], "several model files (a.onnx, ?.onnx)"),
        (["1/\udcff/there"], "no model file"),
        (["\udcff.onnx"], "move ?.onnx to m/1/"),
    ],
)
def test_what_is_wrong_can_be_told_whatever_files_are_called(model, places, told):
    """A name that is no UTF-8 would keep a server from telling of all its models."""
    (problem,) = read_folder(model(**files(*places))).problems
    assert told in problem
    assert problem.encode()


def test_versions_are_numbers_without_leading_zeros(model):
    places = ("1", "10", "9", "02", "0", "-1", "1.0", "3a", "٣", ".4", "5.tmp", "1" * 19)
    folder = read_folder(model(**files(*(f"{place}/model.onnx" for place in places))))
    assert list(folder.versions) == [1, 9, 10]
    assert folder.on_disk == {1, 9, 10}
    assert folder.problems == ()


@pytest.mark.parametrize(
    ("policy", "selected"),
    [
        ("all", [1, 9, 10]),
        ("{latest: 1}", [10]),
        ("{latest: 2}", [9, 10]),
        ("{latest: 5}", [1, 9, 10]),
        ("{only: [10, 1]}", [1, 10]),
    ],
)
def test_selected_versions(model, policy, selected):
    places = files("1/model.onnx", "10/model.onnx", "9/model.onnx")
    assert selected_versions(read_folder(model(**places, **{"config.yaml": f"versions: {policy}"}))) == selected


def test_the_newest_version_that_can_be_served_is_the_latest(model):
    path = model(**files("1/model.onnx", "2/model.onnx.part"))
    folder = read_folder(path)
    assert selected_versions(folder) == [1]
    assert folder.on_disk == {1, 2}
    assert list(folder.broken_versions) == [2]
    assert folder.problems[0].startswith("2: has no model file, expected model.* with an ending of .onnx, ")


def test_a_wanted_version_without_a_folder_is_a_problem(model):
    folder = read_folder(model(**files("1/model.onnx"), **{"config.yaml": "versions: {only: [1, 3]}"}))
    assert selected_versions(folder) == [1]
    assert folder.problems == ("3: is wanted by the configuration's versions, and there is no such folder",)
    assert folder.on_disk == {1}


@pytest.mark.parametrize(
    ("places", "config", "backend", "found"),
    [
        (["model.pt"], "", "torch", "model.pt"),
        (["model.pt2", "model.pt"], "", "torch", "model.pt2"),
        (["model.py", "helper.py", "weights.npz"], "", "python", "model.py"),
        (["model.xml", "model.bin"], "", "openvino", "model.xml"),
        (["model.onnx"], "backend: openvino", "openvino", "model.onnx"),
        (["model.tflite"], "backend: openvino", "openvino", "model.tflite"),
        (["model.onnx", "model.xml", "model.bin"], "backend: openvino", "openvino", "model.xml"),
        (["net.onnx"], "backend: openvino", "openvino", "net.onnx"),
        (["model.onnx", "model.onnx.data"], "", "onnxruntime", "model.onnx"),
        (["net.onnx", ".model.onnx", "model.onnx.tmp", "model.pt~", "README"], "", "onnxruntime", "net.onnx"),
        (["MODEL.ONNX"], "", "onnxruntime", "MODEL.ONNX"),
        (["model.onnx", "model.py"], "backend: python", "python", "model.py"),
        (["model.onnx", "model.py"], "model_file: model.onnx", "onnxruntime", "model.onnx"),
        (["a.onnx", "b.onnx"], "model_file: b.onnx", "onnxruntime", "b.onnx"),
        (["model.onnx"], "backend: tensorrt", "tensorrt", "model.onnx"),
        (["model.onnx", "model.plan"], "backend: tensorrt", "tensorrt", "model.plan"),
        (["model.onnx", "model.plan"], "backend: onnxruntime", "onnxruntime", "model.onnx"),
        (["net.engine"], "", "tensorrt", "net.engine"),
        (["weights.bin"], "{backend: onnxruntime, model_file: weights.bin}", "onnxruntime", "weights.bin"),
        (["model.pt"], "backend: pytorch", "torch", "model.pt"),
        (["anything"], "backend: fake", "fake", ""),
        (["model.onnx/model.onnx", "model.onnx/weights"], "", "onnxruntime", "model.onnx/model.onnx"),
        (["net.onnx/model.onnx"], "model_file: net.onnx", "onnxruntime", "net.onnx/model.onnx"),
        (["model.onnx"], "backend: their_plugin", "their_plugin", ""),
        (["x.y"], "{backend: their_plugin, model_file: x.y}", "their_plugin", "x.y"),
    ],
)
def test_finding_the_model_file(model, places, config, backend, found):
    folder = read_folder(model(**files(*(f"1/{place}" for place in places)), **{"config.yaml": config}))
    assert folder.problems == ()
    assert folder.versions[1].backend == backend
    assert folder.versions[1].model_path == folder.path / "1" / found


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 102531\n"
XGBOOST = '{"learner":{"attributes":{}}}'


@pytest.mark.parametrize(
    ("contents", "config", "backend", "found"),
    [
        ({"model.keras": "k"}, "", "tensorflow", "model.keras"),
        ({"model.savedmodel/saved_model.pb": "s"}, "", "tensorflow", "model.savedmodel"),
        ({"saved_model.pb": "s", "variables/variables.index": "i"}, "", "tensorflow", "saved_model.pb"),
        ({"model.tflite": "t"}, "", "litert", "model.tflite"),
        ({"model.tflite": "t"}, "backend: openvino", "openvino", "model.tflite"),
        ({"model.skops": "s", "readme.json": "{}"}, "", "sklearn", "model.skops"),
        ({"model.json": XGBOOST, "vocabulary.json": "{}"}, "", "xgboost", "model.json"),
        ({"iris.json": XGBOOST, "vocabulary.json": "{}"}, "", "xgboost", "iris.json"),
        ({"xgboost.json": XGBOOST, "other.json": "{}"}, "backend: xgboost", "xgboost", "xgboost.json"),
        ({"model.json": "{}"}, "backend: xgboost", "xgboost", "model.json"),
        # What often belongs to a model is none where there is another.
        ({"model.py": "p", "model.pkl": "p", "model.json": XGBOOST}, "", "python", "model.py"),
        ({"serve.py": "p", "weights.h5": "h", "model.keras": "k"}, "", "python", "serve.py"),
        (
            {"model.onnx": "o", "model.keras": "k", "model.savedmodel/saved_model.pb": "s"},
            "",
            "onnxruntime",
            "model.onnx",
        ),
        ({"net.pt2": "o", "model.tflite": "t"}, "", "torch", "net.pt2"),
    ],
)
def test_finding_a_model_of_another_framework(model, contents, config, backend, found):
    placed = {f"1/{place}": text for place, text in contents.items()}
    folder = read_folder(model(**placed, **{"config.yaml": config}))
    assert folder.problems == ()
    assert folder.versions[1].backend == backend
    assert folder.versions[1].model_path == folder.path / "1" / found


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (
            {"model.json": '{"architecture": "x"}', "model.safetensors": "s"},
            "; found: model.json (which does not begin as a model of XGBoost), model.safetensors",
        ),
        ({"model.onnx": LFS_POINTER}, "1: its model file 'model.onnx' is a pointer of Git LFS and not the model"),
        (
            {"model.keras": "k", "model.skops": "s"},
            "1: has several model files (model.keras, model.skops); set backend",
        ),
    ],
)
def test_no_single_model_of_another_framework(model, contents, problem):
    folder = read_folder(model(**{f"1/{place}": text for place, text in contents.items()}))
    assert len(folder.problems) == 1
    assert problem in folder.problems[0]


def test_a_pipe_is_not_waited_for(model):
    path = model(**{"1/README": "x"})
    os.mkfifo(path / "1/model.json")
    assert read_folder(path).problems[0].startswith("1: has no model file")
    os.mkfifo(path / "1/model.onnx")
    assert read_folder(path).problems == ("1: its model file 'model.onnx' is not an ordinary file",)


@pytest.mark.parametrize(
    ("places", "config", "problem"),
    [
        (["README"], "", "1: has no model file, expected model.* with an ending of .onnx"),
        (["net.onnx/other.onnx"], "", "1: its model file 'net.onnx' is a folder, expected a file model.onnx in it"),
        (["model.pt2/data.pkl"], "", "1: its model file 'model.pt2' is a folder, expected a file"),
        (["model.onnx"], "backend: torch", "1: has no model file for backend 'torch', expected model.pt2 or model.pt"),
        (["model.onnx", "model.py"], "", "1: has several model files (model.onnx, model.py); set backend or model_"),
        (
            ["model.onnx", "model.plan"],
            "",
            "1: has several model files (model.onnx, model.plan); set backend or model_",
        ),
        (["a.onnx", "b.onnx"], "", "1: has several model files (a.onnx, b.onnx); set backend or model_file"),
        (["model.onnx"], "model_file: net.onnx", "1: its model file 'net.onnx' cannot be read: No such file"),
        (["x.y"], "model_file: x.y", "1: has the model file 'x.y', whose ending tells no backend; set backend"),
    ],
)
def test_no_single_model_file(model, places, config, problem):
    folder = read_folder(model(**files(*(f"1/{place}" for place in places)), **{"config.yaml": config}))
    assert len(folder.problems) == 1
    assert folder.problems[0].startswith(problem)
    assert folder.versions == {}
    assert folder.on_disk == {1}


def test_labels(model):
    config = "outputs: [{name: y, datatype: FP32, shape: [-1, 3], labels: labels.txt}]"
    text = "cat\r\nd\u2028og\n\nlast\n"
    folder = read_folder(model(**files("1/model.onnx"), **{"config.yaml": config, "labels.txt": text}))
    assert folder.problems == ()
    assert folder.labels == {"y": ("cat", "d\u2028og", "", "last")}


def test_an_ensemble_needs_no_folder_for_its_version(model):
    config = "ensemble: [{model: a, inputs: {x: x}, outputs: {y: y}}]"
    folder = read_folder(model(**{"config.yaml": config}))
    assert folder.problems == ()
    assert folder.on_disk == {1}
    assert selected_versions(folder) == [1]
    version = folder.versions[1]
    assert (version.backend, version.model_path, version.model_bytes) == ("ensemble", folder.path / "1", 0)
    (folder.path / "3").mkdir()
    assert selected_versions(read_folder(folder.path)) == [3]


STATES = """
sequence:
  states: [{input: s, output: t, datatype: INT8, shape: [3], initial: a},
           {input: u, output: v, datatype: INT8, shape: [-1], initial: b},
           {input: w, output: x, datatype: INT8, shape: [2]}]
"""


def test_what_states_begin_with(model):
    places = {"initial_state/a": b"123", "a": b"too long", "b": b"4"}
    folder = read_folder(model(**files("1/model.onnx"), **places, **{"config.yaml": STATES}))
    assert folder.problems == ()
    assert folder.sequence is not None
    assert [state.initial for state in folder.sequence.states] == [b"123", b"4", b""]
    assert read_folder(model(**{"config.yaml": ""})).sequence is None


def test_a_state_that_cannot_begin_with_its_file(model):
    folder = read_folder(model(**files("1/model.onnx"), **{"a": b"12", "config.yaml": STATES}))
    assert folder.sequence is not None
    assert folder.problems == (
        "a: has 2 bytes, expected 3 for INT8[3]; sequences are to begin with it as state 's'",
        "b: cannot be read: No such file or directory; sequences are to begin with it as state 'u'",
    )


def test_prints_change_with_what_states_begin_with(model):
    path = model(**files("1/model.onnx"), **{"a": b"123", "b": b"1", "config.yaml": STATES})
    seen = {prints(path)["config"]}
    for place in ("b", "initial_state/a"):
        model(**{place: b"new"})
        seen.add(prints(path)["config"])
    assert len(seen) == 3


def test_a_configuration_in_place_of_the_folders_own(model):
    path = model(**files("1/model.onnx"), **{"config.yaml": "max_batch_size: x"})
    folder = read_folder(path, parse_config("max_batch_size: 4\nversions: all"), "its print")
    assert folder.problems == ()
    assert folder.config.max_batch_size == 4
    assert folder.config_print == "its print"


def test_pbtxt_is_read(model):
    folder = read_folder(model(**files("1/model.onnx"), **{"config.pbtxt": 'name: "m" max_batch_size: 4'}))
    assert folder.problems == ()
    assert folder.config.max_batch_size == 4


# ---- what users may have put there ----


@pytest.mark.parametrize(
    ("config_files", "problems"),
    [
        ({"config.yaml": "max_batch_size: x\nbackend: 1"}, ["config.yaml: backend: ", "config.yaml: max_batch_size: "]),
        ({"config.yaml": b"\xff\xfe\x00\x01"}, ["config.yaml: is not UTF-8 text: invalid start byte at byte 0"]),
        ({"config.yaml": b"\x00" * 100}, ["config.yaml: is not YAML: "]),
        ({"config.yaml": b"#" * (layout.MAX_CONFIG_BYTES + 1)}, ["config.yaml: is larger than 1048576 bytes"]),
        ({"config.yaml/nested": ""}, ["config.yaml: cannot be read: Is a directory"]),
        ({"config.pbtxt": 'name: "other"'}, ["config.pbtxt: name: is 'other', expected the folder's name, 'm'"]),
        ({"config.pbtxt": "{"}, ["config.pbtxt: line 1, column 1: "]),
        ({"config.yaml": "", "config.pbtxt": ""}, ["config.yaml and config.pbtxt are both present, expected one"]),
        ({"config.yml": ""}, ["config.yml: is not read, expected config.yaml or config.pbtxt"]),
        (
            {"config.yaml": "outputs: [{name: y, datatype: FP32, shape: [1], labels: l.txt}]"},
            ["l.txt: cannot be read: No such file or directory; it is to have the labels of output 'y'"],
        ),
        (
            {"config.yaml": "outputs: [{name: y, datatype: FP32, shape: [1], labels: l.txt}]", "l.txt": b"\xff"},
            ["l.txt: is not UTF-8 text"],
        ),
    ],
)
def test_a_model_with_such_problems_is_not_served(model, config_files, problems):
    folder = read_folder(model(**files("1/model.onnx"), **config_files))
    assert len(folder.problems) == len(problems)
    for problem, expected in zip(folder.problems, problems, strict=True):
        assert problem.startswith(expected)
    assert folder.model_problems == folder.problems
    assert selected_versions(folder) == []
    assert folder.on_disk == {1}  # so that what serves is not taken for deleted


def test_a_model_without_versions(model):
    folder = read_folder(model(**{"config.yaml": ""}))
    assert folder.problems == ("has no version: expected a folder named 1, 2, ... with a model file in it",)


def test_a_folder_that_is_not_there(tmp_path):
    assert read_folder(tmp_path / "gone").problems == ("cannot be read: No such file or directory",)
    (tmp_path / "plain").write_text("")
    assert read_folder(tmp_path / "plain").problems == ("cannot be read: Not a directory",)


def test_a_byte_order_mark_is_no_problem(model):
    path = model(**files("1/model.onnx"), **{"config.yaml": b"\xef\xbb\xbfmax_batch_size: 4"})
    assert read_folder(path).config.max_batch_size == 4


def test_broken_links(model):
    path = model(**files("1/model.onnx"))
    (path / "2").symlink_to(path / "nowhere")
    (path / "3").symlink_to(path / "3")
    (path / "4").mkdir()
    (path / "4" / "model.onnx").symlink_to("nowhere")
    folder = read_folder(path)
    assert folder.broken_versions == {
        2: "cannot be read: No such file or directory",
        3: "cannot be read: Too many levels of symbolic links",
        4: "its model file 'model.onnx' cannot be read: No such file or directory",
    }
    assert selected_versions(folder) == [1]
    (path / "config.yaml").symlink_to("nowhere")
    assert read_folder(path).problems == ("config.yaml: cannot be read: No such file or directory",)


def test_a_named_pipe_is_not_waited_for(model):
    path = model(**files("1/model.onnx"))
    os.mkfifo(path / "config.yaml")
    assert read_folder(path).problems == ("config.yaml: is not an ordinary file",)


def test_folders_without_permission(model, monkeypatch):
    path = model(**files("1/model.onnx", "2/model.onnx"))
    real = os.listdir

    def refuse(folder):  # root may read everything, so permissions alone would prove nothing there
        if os.fspath(folder) == os.fspath(closed):
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return real(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    closed = path / "2"
    assert read_folder(path).problems == ("2: cannot be read: Permission denied",)
    assert selected_versions(read_folder(path)) == [1]
    closed = path
    assert read_folder(path).problems == ("cannot be read: Permission denied",)
    assert list_models(path.parent) == ["m"]


def test_another_folder_in_it_that_may_not_be_read(model, monkeypatch):
    path = model(**{"config.yaml": "", "data/model.onnx": ""})
    real = os.listdir

    def refuse(folder):
        if Path(folder) == path / "data":
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    problem = "has no version: expected a folder named 1, 2, ... with a model file in it"
    assert read_folder(path).problems == (problem,)


# ---- prints ----


def prints(path):
    folder = read_folder(path)
    return {"config": folder.config_print, **{version: one.print for version, one in folder.versions.items()}}


CONFIG = "outputs: [{name: y, datatype: FP32, shape: [1], labels: labels.txt}]\nversions: all"


@pytest.mark.parametrize(
    ("place", "changed"),
    [
        ("1/model.onnx", {1}),
        ("1/deep/er/weights.bin", {1}),
        ("2/model.onnx", {2}),
        ("3/model.onnx", {3}),
        ("labels.txt", {"config"}),
        ("config.yaml", {"config"}),
        ("README.md", set()),
        ("1/.cache", set()),
        ("1/__pycache__/model.pyc", set()),
        ("1/weights.part", set()),
    ],
)
def test_prints_change_with_what_they_cover(model, place, changed):
    path = model(**files("1/model.onnx", "2/model.onnx", "labels.txt"), **{"config.yaml": CONFIG})
    before = prints(path)
    assert prints(path) == before
    model(**{place: CONFIG + " "})
    after = prints(path)
    assert {key for key in after if after[key] != before.get(key)} == changed


def test_fingerprint_sees_every_kind_of_change(tmp_path):
    (tmp_path / "a").write_text("one")
    seen = {fingerprint(tmp_path)}

    def changed():
        found = fingerprint(tmp_path)
        assert found == fingerprint(tmp_path)
        assert found not in seen
        seen.add(found)

    os.utime(tmp_path / "a", ns=(1, 1))
    changed()  # time
    (tmp_path / "a").write_text("longer")
    os.utime(tmp_path / "a", ns=(1, 1))
    changed()  # size
    (tmp_path / "b").write_text("longer")
    os.utime(tmp_path / "b", ns=(1, 1))
    changed()  # a new file
    (tmp_path / "b").replace(tmp_path / "a")
    changed()  # another inode
    (tmp_path / "a").rename(tmp_path / "c")
    changed()  # another name
    (tmp_path / "sub").mkdir()
    (tmp_path / "c").rename(tmp_path / "sub" / "c")
    changed()  # another place
    (tmp_path / "link").symlink_to("nowhere")
    changed()  # a broken link
    (tmp_path / "nowhere").write_text("")
    changed()
    (tmp_path / "sub" / "c").unlink()
    changed()  # deleted


def test_fingerprint_sees_that_a_file_may_be_read_now(tmp_path, monkeypatch):
    """So that a model which was copied in by somebody else is loaded once its permissions are mended."""
    (tmp_path / "a").write_text("one")
    before = fingerprint(tmp_path)
    real = os.access  # root may read everything, so permissions alone would prove nothing
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and Path(path).name != "a")
    assert fingerprint(tmp_path) != before


def test_fingerprint_follows_links_and_ends(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights").write_text("one")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "data").symlink_to(outside)
    (inside / "circle").symlink_to(inside)
    before = fingerprint(inside)
    (outside / "weights").write_text("other")
    assert fingerprint(inside) != before


def test_fingerprint_of_nothing(tmp_path):
    missing = fingerprint(tmp_path / "gone")
    (tmp_path / "gone").mkdir()
    assert fingerprint(tmp_path / "gone") != missing


def test_fingerprint_does_not_run_out_of_stack(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    before = fingerprint(tmp_path)
    (deep / "weights").write_text("")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        after = fingerprint(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert after != before


@pytest.mark.parametrize(
    "loose", ["model.onnx", "v1/model.onnx", "model.keras", "v1/model.tflite", "iris.joblib", "model.json"]
)
def test_a_model_file_outside_a_version_folder_is_told_and_not_passed_over(tmp_path, loose):
    file = tmp_path / "m" / loose
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert list_models(tmp_path) == ["m"]
    (problem,) = read_folder(tmp_path / "m").problems
    assert problem.endswith(f"; move {loose} to m/1/")


def test_whoever_gives_a_model_as_the_repository_is_told(tmp_path, monkeypatch):
    file = tmp_path / "all" / "digits" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert list_models(tmp_path / "all" / "digits") == ["1"]
    monkeypatch.chdir(tmp_path / "all" / "digits")
    for repository in (tmp_path / "all" / "digits", Path()):
        (problem,) = read_folder(repository / "1").problems
        assert problem.endswith(f"; if digits is the model, the repository is {tmp_path / 'all'}")
