"""Models written in Python: a version's folder with a model.py that has a class ``Model``."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from headrace.core.model import Signature
from headrace_backends.base import (
    Answer,
    Array,
    Backend,
    InputError,
    LoadError,
    ModelSource,
    RequestInfo,
    ResponseStream,
)
from headrace_backends.model_code import ModelCode, guarded
from headrace_backends.python_context import ModelContext
from headrace_backends.python_declared import declared_signature
from headrace_backends.python_values import checked
from headrace_backends.triton_python.backend import TritonApi, TritonPythonBackend

_HOW_INFER_LOOKS = "expected infer(self, inputs), or infer(self, inputs, request) to be told of the request"


class PythonBackend(Backend):
    """One instance of a user's ``Model``: ``infer(inputs)``, and where it has them ``load(context)``, ``unload()``.

    An ``infer`` with a second parameter is told of the requests: a plain one of all in the batch, as a list of
    RequestInfo, and may then give a list with an Answer for each; one that streams of the one that it answers. It
    streams where it is a generator function, or where the configuration says decoupled.
    """

    remembers = True

    def __init__(self, code: ModelCode, model: Any, signature: Signature, *, told: bool) -> None:
        self._code = code
        self._model = model
        self._infer: Callable[..., Any] = model.infer
        self._signature = signature
        self._outputs = {spec.name: spec for spec in signature.outputs}
        self._told = told
        self.wants_requests = told and not signature.decoupled

    @classmethod
    def load(cls, source: ModelSource) -> Backend:
        """Import model.py, make the Model and let it load; or, where it is one, a TritonPythonModel."""
        if "EXECUTION_ENV_PATH" in source.parameters:
            raise LoadError(
                "the parameter EXECUTION_ENV_PATH is not offered: install the packages that model.py needs "
                "into the server's own environment, and remove the parameter"
            )
        code = ModelCode.of(source.path)
        api = TritonApi(source, code)
        try:
            module = code.open()
            if not hasattr(module, "Model") and hasattr(module, "TritonPythonModel"):
                return TritonPythonBackend.make(source, code, api, module.TritonPythonModel)
            backend = cls._make(source, code, getattr(module, "Model", None))
        except BaseException:
            api.close()
            code.forget()
            raise
        api.close()
        code.shut()
        return backend

    @classmethod
    def _make(cls, source: ModelSource, code: ModelCode, model_class: Any) -> "PythonBackend":
        streams = _check(model_class)
        signature = declared_signature(source, model_class, decoupled=streams or source.decoupled)
        context = ModelContext(
            source.name, source.version, code.folder, source.parameters, source.device, source.threads, source.calls
        )
        model = guarded(code.folder, "cannot make its Model", model_class)
        told = _is_told(model.infer)
        if callable(getattr(model, "load", None)):
            guarded(code.folder, "fails in Model.load", lambda: model.load(context))
        return cls(code, model, signature, told=told)

    @property
    def signature(self) -> Signature:
        """What config.yaml declares, or else the class."""
        return self._signature

    def execute(
        self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]
    ) -> Mapping[str, Array] | Sequence[Answer]:
        """Call ``infer``, and hold its result against the declared outputs."""
        result = self._infer(dict(inputs), list(requests)) if self._told else self._infer(dict(inputs))
        if isinstance(result, Mapping):
            return checked(result, self._outputs, tuple(self._outputs), self._rows(inputs, requests))
        if isinstance(result, list) and all(isinstance(one, Answer) for one in result):
            return self._answers(result, requests)
        raise self._wrong(result)

    def begin(self, inputs: Mapping[str, Array], stream: ResponseStream) -> Iterator[Answer]:
        """Call ``infer`` for one request; each dict that it yields is a response."""
        result = self._infer(dict(inputs), stream.request) if self._told else self._infer(dict(inputs))
        if isinstance(result, Mapping | Answer):
            result = iter((result,))
        if not isinstance(result, Iterator):
            raise self._wrong(result)
        return self._streamed(result)

    def close(self) -> None:
        """Let the model unload, and forget its module."""
        unload = getattr(self._model, "unload", None)
        try:
            if callable(unload):
                unload()
        finally:
            self._code.forget()

    def _streamed(self, results: Iterator[Any]) -> Iterator[Answer]:
        try:
            for result in results:
                if isinstance(result, Mapping):
                    yield self._checked_part(Answer(result))
                elif isinstance(result, Answer):
                    yield self._checked_part(result)
                else:
                    raise TypeError(f"infer yielded {type(result).__name__}, expected a dict of arrays by output name")
        finally:
            # So that the model's own ``finally`` runs as soon as nobody wants more.
            if inspect.isgenerator(results):
                results.close()

    def _checked_part(self, answer: Answer) -> Answer:
        if answer.error is not None:
            return answer
        if not answer.outputs:
            raise RuntimeError(f"infer yielded a response without outputs, expected some of {list(self._outputs)}")
        return Answer(checked(answer.outputs, self._outputs, (), rows=None), answer.parameters)

    def _answers(self, answers: list[Answer], requests: Sequence[RequestInfo]) -> list[Answer]:
        if not self._told:
            raise RuntimeError(f"infer gave a list of Answer but does not take the requests; {_HOW_INFER_LOOKS}")
        if len(answers) != len(requests):
            raise RuntimeError(f"infer gave {len(answers)} answers for {len(requests)} requests")
        return [self._checked_answer(*pair) for pair in zip(answers, requests, strict=True)]

    def _checked_answer(self, answer: Answer, request: RequestInfo) -> Answer:
        """One request's answer; where it is not as declared, that is its error and not the others'."""
        if answer.error is not None:
            return answer
        wanted = request.outputs or tuple(self._outputs)
        rows = request.rows if self._signature.max_batch_size else None
        try:
            return Answer(checked(answer.outputs, self._outputs, wanted, rows), answer.parameters)
        except RuntimeError as error:
            return Answer(error=error)

    def _rows(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> int | None:
        """How many rows the outputs must have; None where the model does not batch."""
        if not self._signature.max_batch_size:
            return None
        for array in inputs.values():
            return len(array)
        return sum(request.rows for request in requests)

    def _wrong(self, result: Any) -> RuntimeError:
        if inspect.isgenerator(result) and not self._signature.decoupled:
            return RuntimeError(
                "infer gave a generator, and the model is not decoupled: make infer itself a generator function, "
                "or set decoupled: true in config.yaml"
            )
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that nobody awaited it
        return RuntimeError(f"infer gave {type(result).__name__}, expected a dict of arrays by output name")


def _check(model_class: Any) -> bool:
    """Whether the class streams.

    Raises:
        LoadError: it is none, or its methods are not what they should be.
    """
    if not isinstance(model_class, type):
        raise LoadError("model.py has no class Model, nor a TritonPythonModel")
    if not callable(getattr(model_class, "infer", None)):
        raise LoadError("the class Model in model.py has no method infer(self, inputs)")
    for name in ("infer", "load", "unload"):
        method = getattr(model_class, name, None)
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            raise LoadError(f"Model.{name} is async, expected a plain method: {name}(self, ...)")
        if inspect.isgeneratorfunction(method) and name != "infer":
            raise LoadError(f"Model.{name} is a generator function, expected a plain method: only infer may yield")
    return inspect.isgeneratorfunction(getattr(model_class, "infer", None))


def _is_told(infer: Callable[..., Any]) -> bool:
    """Whether ``infer`` takes the request too: by a second parameter with no default, or None for one.

    Raises:
        LoadError: it cannot be called with one or two arguments.
    """
    try:
        parameters = inspect.signature(infer).parameters.values()
    except (TypeError, ValueError):  # something in C that does not tell
        return False
    positional = [one for one in parameters if one.kind in {one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD}]
    needed = [one.name for one in positional if one.default is one.empty]
    keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if len(needed) > 2 or keywords:
        raise LoadError(f"Model.infer needs the arguments {[*needed, *keywords]}, {_HOW_INFER_LOOKS}")
    return len(positional) > 1 and (positional[1].default is positional[1].empty or positional[1].default is None)


__all__ = ["Answer", "InputError", "ModelContext", "PythonBackend", "RequestInfo"]
