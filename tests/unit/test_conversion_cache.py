"""Conversions that are kept: keys that change with all that matters, whole or not at all, one conversion at a time."""

import json
import os
import threading
from contextlib import ExitStack

import pytest

from headrace_backends.base import ModelSource
from headrace_backends.importers import conversion
from headrace_backends.importers.conversion_cache import MODEL_FILE, ConversionCache, conversion_key
from headrace_backends.importers.formats import Format

FORMAT = Format("made", "Made", "made", {".made": "module:function"}, {})
KEY = conversion_key("abc", {"tf2onnx": "1.17"}, {"signature": "a"})


def fill(cache, key=KEY, content=b"onnx", notes=("note",)):
    with cache.converting(key) as folder:
        (folder / MODEL_FILE).write_bytes(content)
        (folder / "weights.bin").write_bytes(b"w")
        return cache.put(key, folder, list(notes))


def test_a_key_changes_with_source_versions_and_options():
    keys = {
        KEY,
        conversion_key("abd", {"tf2onnx": "1.17"}, {"signature": "a"}),
        conversion_key("abc", {"tf2onnx": "1.18"}, {"signature": "a"}),
        conversion_key("abc", {"tf2onnx": "1.17", "onnx": "1"}, {"signature": "a"}),
        conversion_key("abc", {"tf2onnx": "1.17"}, {"signature": "b"}),
        conversion_key("abc", {"tf2onnx": "1.17"}, {}),
    }
    assert len(keys) == 6
    assert conversion_key("a", {"x": "1", "y": "2"}, {}) == conversion_key("a", {"y": "2", "x": "1"}, {})


def test_what_was_kept_is_found(tmp_path):
    cache = ConversionCache(tmp_path / "not/there/yet")
    with cache.converting(KEY):
        assert cache.get(KEY) == (None, [], None)
    path = fill(cache)
    assert path.read_bytes() == b"onnx"
    assert cache.get(KEY) == (path, ["note"], None)
    assert fill(cache, content=b"other").read_bytes() == b"other"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda place: (place / MODEL_FILE).write_bytes(b"onnY"), "is damaged"),
        (lambda place: (place / "weights.bin").write_bytes(b""), "is damaged"),
        (lambda place: (place / "weights.bin").unlink(), "is not whole"),
        (lambda place: (place / "conversion.json").unlink(), "is not whole"),
        (lambda place: (place / "conversion.json").write_text("{"), "cannot be read"),
        (lambda place: (place / "conversion.json").write_text("[]"), "cannot be read"),
        (lambda place: (place / "conversion.json").write_text(json.dumps({"files": {}, "notes": []})), "is damaged"),
    ],
)
def test_what_is_not_as_it_was_put_there_is_not_there(tmp_path, harm, told):
    cache = ConversionCache(tmp_path)
    harm(fill(cache).parent)
    path, notes, wrong = cache.get(KEY)
    assert (path, notes) == (None, [])
    assert told in wrong
    assert fill(cache) == cache.get(KEY)[0]


def test_nothing_is_left_of_a_conversion_that_failed_or_was_killed(tmp_path):
    cache = ConversionCache(tmp_path)
    with pytest.raises(ZeroDivisionError), cache.converting(KEY) as folder:
        (folder / MODEL_FILE).write_bytes(b"%d" % (1 // 0))
    assert [one.name for one in tmp_path.iterdir()] == [f"{KEY}.lock"]
    (tmp_path / f".new-{KEY}").mkdir()  # as SIGKILL leaves it
    (tmp_path / f".new-{KEY}" / MODEL_FILE).write_bytes(b"half")
    with cache.converting(KEY) as folder:
        assert list(folder.iterdir()) == []
        assert cache.get(KEY)[0] is None


def test_who_comes_meanwhile_waits_and_finds_it(tmp_path):
    found = []

    def other():
        with ConversionCache(tmp_path).converting(KEY):
            found.append(ConversionCache(tmp_path).get(KEY)[0])

    cache = ConversionCache(tmp_path)
    thread = threading.Thread(target=other)
    with cache.converting(KEY) as folder:
        thread.start()
        (folder / MODEL_FILE).write_bytes(b"onnx")
        assert not found
        path = cache.put(KEY, folder, [])
    thread.join()
    assert found == [path]


def test_what_was_used_longest_ago_goes(tmp_path):
    cache = ConversionCache(tmp_path, limit_bytes=250)
    paths = {key: fill(cache, key, b"x" * 50, ()) for key in ("a", "b")}
    os.utime(paths["a"].parent, (1, 1))
    os.utime(paths["b"].parent, (2, 2))
    assert cache.get("a")[0] is not None  # used now
    fill(cache, "c", b"x" * 50, ())
    assert {key: cache.get(key)[0] is not None for key in "abc"} == {"a": True, "b": False, "c": True}


def test_what_another_version_of_the_server_converted_is_made_anew(tmp_path, monkeypatch):
    source = ModelSource("m", "1", tmp_path / "model.made")
    source.path.write_bytes(b"model")
    versions = ["0.1"]
    made = []

    def convert(task, folder, threads):
        made.append(versions[0])
        (folder / MODEL_FILE).write_bytes(b"onnx")
        return []

    monkeypatch.setattr(conversion, "_convert", convert)
    monkeypatch.setattr(conversion, "version_of", lambda name: versions[0])
    for version in ("0.1", "0.1", "0.2", "0.2", "0.1"):
        versions[0] = version
        with ExitStack() as holding:
            conversion.converted(source, FORMAT, {"conversion_cache": str(tmp_path / "cache")}, holding)
    assert made == ["0.1", "0.2"]
