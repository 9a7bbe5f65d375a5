"""Which TensorRT there is, and whether an engine file goes with it: told before anything is loaded."""

import struct
import sys
from types import SimpleNamespace

import pytest
from unit.tensorrt_fakes import fake_library

from headrace_backends.base import BackendUnavailable, LoadError
from headrace_backends.tensorrt import capability
from headrace_backends.tensorrt.engine_file import (
    UNKNOWN,
    EngineHeader,
    misfit,
    read_engine,
    read_header,
    rebuild_advice,
)
from headrace_backends.tensorrt.library import find_library, version_numbers


def header(tag=b"ftrt", version=(10, 13, 3, 9), nbytes=64, bits=0):
    return struct.pack("<4sIQQ4B4sI", tag, 0, 2, nbytes, *version, tag, bits) + bytes(28)


# -- the library ------------------------------------------------------------------------------------------


def missing(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_neither_library_says_what_to_install(monkeypatch):
    missing(monkeypatch, "tensorrt", "tensorrt_rtx")
    with pytest.raises(BackendUnavailable, match=r"(?s)neither.*pip install 'headrace\[tensorrt\]'.*\[tensorrt-rtx\]"):
        find_library()


def test_the_full_library_comes_first_and_rtx_can_be_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.1.0.106"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.1.116"))
    assert str(find_library()) == "TensorRT 11.1.0.106"
    assert str(find_library("tensorrt-rtx")) == "TensorRT-RTX 1.7.1.116"


def test_a_library_that_is_too_old_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    missing(monkeypatch, "tensorrt_rtx")
    with pytest.raises(BackendUnavailable, match=r"version 8\.6\.1 is too old, 10\.1 is the oldest"):
        find_library()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.2.0"))
    assert find_library().is_rtx


def test_a_library_that_was_asked_for_is_not_replaced(monkeypatch):
    missing(monkeypatch, "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.1.116"))
    with pytest.raises(BackendUnavailable, match="tensorrt does not import here"):
        find_library("tensorrt")
    with pytest.raises(LoadError, match=r"parameters\.library is 'trt', expected one of tensorrt, tensorrt-rtx"):
        find_library("trt")


def test_versions():
    assert version_numbers("10.13.3.9") == (10, 13, 3, 9)
    assert version_numbers("11.0.0.dev1") == (11, 0, 0)
    assert version_numbers("") == ()


# -- headers ----------------------------------------------------------------------------------------------


def test_a_header_is_read():
    assert read_header(header()) == EngineHeader("tensorrt", (10, 13, 3, 9), 64)
    rtx = read_header(header(b"vtrt", (1, 7, 1, 116), bits=0b1001010))
    assert rtx == EngineHeader("tensorrt-rtx", (1, 7, 1, 116), 64, ((8, 0), (8, 9)), others=True)
    assert rtx.version_text == "1.7.1.116"


@pytest.mark.parametrize("data", [b"", b"ftrt", b"\x08\x07\x12\x04onnx" * 8, header()[:27]])
def test_what_is_no_engine_has_no_header(data):
    assert read_header(data) is None


def test_a_header_of_another_form_tells_no_version():
    other = header()[:4] + b"\1" + header()[5:]
    found = read_header(other)
    assert found.version == UNKNOWN
    assert misfit(found, TRT, (9, 0)) is None  # loading it tells
    assert "here is TensorRT-RTX" in misfit(found, RTX, (9, 0))


@pytest.mark.parametrize("text", [b'{"names": {"0": "person"}}', b"{}", b"{" + b" " * 5000 + b"}"])
def test_engines_with_a_text_before_them(tmp_path, text):
    path = tmp_path / "yolo.engine"
    path.write_bytes(struct.pack("<I", len(text)) + text + header() + b"rest")
    found, data = read_engine(path)
    assert found.version_text == "10.13.3.9"
    assert data == header() + b"rest"
    path.write_bytes(struct.pack("<I", len(text)) + text + b"no engine")
    with pytest.raises(LoadError, match="is no TensorRT engine"):
        read_engine(path)


def test_files_that_are_no_engines_are_told(tmp_path):
    path = tmp_path / "model.plan"
    with pytest.raises(LoadError, match=r"cannot read 'model\.plan': No such file"):
        read_engine(path)
    path.write_bytes(b"not an engine")
    with pytest.raises(LoadError, match=r"'model\.plan' is no TensorRT engine \(it begins with b'not '\)"):
        read_engine(path)
    path.write_bytes(header(b"vtrt", (1, 7, 1, 116), nbytes=100))
    with pytest.raises(LoadError, match=r"has 64 bytes, and its header speaks of 100: copy it anew"):
        read_engine(path)


TRT = fake_library("tensorrt", "10.13.3.9")
RTX = fake_library("tensorrt-rtx", "1.7.1.116")


@pytest.mark.parametrize(
    ("engine", "library", "gpu", "reason"),
    [
        (EngineHeader("tensorrt", (10, 13, 3, 9), 64), TRT, (9, 0), None),
        (EngineHeader("tensorrt", (10, 0, 1, 6), 64), TRT, (9, 0), None),  # may be built for later versions
        (
            EngineHeader("tensorrt", (11, 0, 0, 1), 64),
            TRT,
            (9, 0),
            "built by TensorRT 11.0.0.1, and here is only 10.13",
        ),
        (
            EngineHeader("tensorrt", (10, 13, 3, 9), 64),
            RTX,
            (9, 0),
            "built by TensorRT 10.13.3.9, and here is TensorRT-R",
        ),
        (
            EngineHeader("tensorrt-rtx", (1, 7, 1, 116), 64),
            TRT,
            None,
            "built by TensorRT-RTX 1.7.1.116, and here is Tens",
        ),
        (EngineHeader("tensorrt-rtx", (1, 7, 1, 116), 64, ((8, 9),)), RTX, (8, 9), None),
        (EngineHeader("tensorrt-rtx", (1, 7, 1, 116), 64, ((8, 9),)), RTX, None, None),
        (EngineHeader("tensorrt-rtx", (1, 7, 1, 116), 64, ((8, 9),), True), RTX, (9, 0), None),
        (
            EngineHeader("tensorrt-rtx", (1, 7, 1, 116), 64, ((8, 6), (8, 9))),
            RTX,
            (9, 0),
            "8.6, 8.9, and this GPU has 9.0",
        ),
        (EngineHeader("tensorrt-rtx", (1, 7, 0, 1), 64, ((8, 9),)), RTX, (8, 9), "RTX 1.7.0.1, and here is 1.7.1.116"),
    ],
)
def test_whether_an_engine_fits(engine, library, gpu, reason):
    found = misfit(engine, library, gpu)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def test_the_advice_names_the_tool():
    assert "build it anew with TensorRT 10.13.3.9 (python -m headrace_backends.tensorrt model.onnx" in rebuild_advice(
        TRT
    )
    assert "with TensorRT-RTX 1.7.1.116" in rebuild_advice(RTX)


def test_compute_capabilities_are_read():
    assert capability.parse("8.9") == capability.parse(8.9) == ((8, 9),)
    assert capability.parse("8.6, 12.0") == capability.parse(["8.6", "12.0"]) == ((8, 6), (12, 0))
    for wrong in ("sm89", "89", "", "8.10"):
        with pytest.raises(LoadError, match=r"compute_capability is '.*', expected one as 8\.9"):
            capability.parse(wrong)
