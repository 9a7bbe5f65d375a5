"""Models of other frameworks as subjects: the ONNX file that they are served as is what the search starts from."""

from contextlib import ExitStack
from dataclasses import replace

from headrace_backends.base import ModelSource
from headrace_backends.importers.conversion import NO_CACHE, converted
from headrace_backends.importers.formats import FORMATS
from headrace_backends.optimize.subject import Subject


def is_imported(backend: str) -> bool:
    """Whether models of this backend are converted before they run."""
    return backend in FORMATS


def as_onnx(subject: Subject) -> Subject:
    """The subject as ONNX, converted if that was not done yet; what is ONNX or cannot become it stays as it is.

    Raises:
        BackendUnavailable: what converts it is not installed.
        LoadError: it cannot be converted.
    """
    made_of = FORMATS.get(subject.backend)
    if made_of is None:
        return subject
    given = dict(subject.parameters)
    if given.get("conversion_cache") == NO_CACHE:
        del given["conversion_cache"]  # the search needs the file for longer than a load does
    source = ModelSource(subject.name, subject.version, subject.path, inputs=subject.inputs, parameters=given)
    with ExitStack() as holding:
        path = converted(source, made_of, given, holding).path
        holding.pop_all()  # a file outside of the cache is needed until this process ends
    rest = {name: value for name, value in subject.parameters.items() if name not in made_of.own_parameters}
    return replace(subject, path=path, backend="onnxruntime", parameters=rest)
