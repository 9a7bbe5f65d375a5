"""Models of other frameworks as the optimiser's subjects: their ONNX form, with the parameters that are for that."""

from pathlib import Path

import pytest

from headrace_backends.base import LoadError
from headrace_backends.importers import conversion
from headrace_backends.importers.conversion import Converted
from headrace_backends.optimize import imported
from headrace_backends.optimize.imported import as_onnx, is_imported
from headrace_backends.optimize.subject import Subject


def subject(path, backend, **parameters):
    return Subject("m", "1", Path(path), backend, Path(), parameters)


@pytest.mark.parametrize(("path", "backend"), [("m.onnx", "onnxruntime"), ("m.pt2", "torch"), ("m.tflite", "litert")])
def test_others_stay_as_they_are(path, backend):
    one = subject(path, backend, intra_op_threads=2)
    assert as_onnx(one) is one
    assert not is_imported(backend)


def test_what_is_converted_is_a_subject_of_onnx_runtime(monkeypatch):
    asked = []

    def converted(source, made_of, given, holding):
        asked.append((source.path, made_of.backend, dict(given)))
        holding.callback(asked.append, "gone")
        return Converted(Path("/cache/model.onnx"), [])

    monkeypatch.setattr(imported, "converted", converted)
    one = as_onnx(subject("m.keras", "tensorflow", signature="a", intra_op_threads=2, conversion_cache="off"))
    assert (one.path, one.backend) == (Path("/cache/model.onnx"), "onnxruntime")
    assert one.parameters == {"intra_op_threads": 2}
    assert one.reference.name == "onnxruntime"
    # Kept for as long as the search may need it.
    assert asked == [(Path("m.keras"), "tensorflow", {"signature": "a", "intra_op_threads": 2})]
    assert conversion.NO_CACHE == "off"


def test_a_pickle_is_not_opened_for_the_optimiser_either():
    with pytest.raises(LoadError, match="is a pickle, which could run any code"):
        as_onnx(subject("m.pkl", "sklearn"))
