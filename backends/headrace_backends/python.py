"""Models written in Python: a version's folder with a model.py that has a class ``Model``."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import numpy as np

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DATATYPE_BY_NAME, NUMPY_DTYPES, DataType
from headrace_backends.base import Array, Backend, InputError, LoadError, ModelSource, RequestInfo

_HOW_TO_DECLARE = (
    "declare them in config.yaml or as attributes of the class Model: "
    'inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}], outputs likewise, '
    "and max_batch_size = 32 where rows may be merged"
)
_SPEC_KEYS = {"name", "datatype", "shape", "optional"}
_MODULE_PREFIX = "headrace_model_"
_BECOMES = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}  # plain Python numbers of which kinds, by the declared kind


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What ``Model.load`` is told: ``path`` is the version's folder, for the files that lie beside model.py."""

    name: str
    version: str
    path: Path
    parameters: Mapping[str, Any]
    device: str
    threads: int


class PythonBackend(Backend):
    """One instance of a user's ``Model``: ``infer(inputs)``, and where it has them ``load(context)``, ``unload()``."""

    def __init__(self, module: str, model: Any, signature: Signature) -> None:
        self._module = module
        self._model = model
        self._infer: Callable[[dict[str, Array]], Any] = model.infer
        self._signature = signature
        self._outputs = {spec.name: spec for spec in signature.outputs}

    @classmethod
    def load(cls, source: ModelSource) -> "PythonBackend":
        """Import model.py, make the Model and let it load."""
        file = source.path / "model.py" if source.path.is_dir() else source.path
        if not file.is_file():
            raise LoadError(f"there is no file '{file.name}' in '{file.parent}'")
        folder = file.parent
        context = ModelContext(source.name, source.version, folder, source.parameters, source.device, source.threads)
        with _imports_from(folder):
            module = _guarded(folder, "does not import", lambda: _imported(file))
            try:
                model_class = _model_class(module)
                signature = _signature(source, model_class)
                model = _guarded(folder, "cannot make its Model", model_class)
                if callable(getattr(model, "load", None)):
                    _guarded(folder, "fails in Model.load", lambda: model.load(context))
            except LoadError:
                del sys.modules[module.__name__]
                raise
        return cls(module.__name__, model, signature)

    @property
    def signature(self) -> Signature:
        """What config.yaml declares, or else the class."""
        return self._signature

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Call ``infer``, and hold its result against the declared outputs."""
        result = self._infer(dict(inputs))
        if not isinstance(result, Mapping):
            raise self._wrong(result)
        missing = [name for name in self._outputs if name not in result]
        extra = [name for name in result if name not in self._outputs]
        if missing or extra:
            raise RuntimeError(f"infer gave the outputs {list(result)}, expected {list(self._outputs)}")
        rows = self._rows(inputs, requests)
        outputs = {}
        for name, spec in self._outputs.items():
            array = self._converted(spec, result[name])
            problem = _shape_problem(array.shape, spec, rows)
            if problem:
                raise RuntimeError(f"output '{name}' {problem}")
            outputs[name] = array
        return outputs

    def close(self) -> None:
        """Let the model unload, and forget its module."""
        unload = getattr(self._model, "unload", None)
        try:
            if callable(unload):
                unload()
        finally:
            sys.modules.pop(self._module, None)

    def _rows(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> int | None:
        """How many rows the outputs must have; None where the model does not batch."""
        if not self._signature.max_batch_size:
            return None
        for array in inputs.values():
            return len(array)
        return sum(request.rows for request in requests)

    def _wrong(self, result: Any) -> RuntimeError:
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            return RuntimeError(
                "infer gave a generator, and streamed answers are not offered yet; return a dict of arrays"
            )
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that nobody awaited it
        return RuntimeError(f"infer gave {type(result).__name__}, expected a dict of arrays by output name")

    def _converted(self, spec: TensorSpec, value: Any) -> Array:
        try:
            return _as_text(value) if spec.datatype is DataType.BYTES else _as_numbers(value, spec.datatype)
        except (TypeError, ValueError, OverflowError) as error:
            raise RuntimeError(f"output '{spec.name}' {error}, expected {spec.datatype}") from error


def _as_numbers(value: Any, datatype: DataType) -> Array:
    """An array as it is, which must have the declared type; or plain Python numbers, given that type."""
    dtype = NUMPY_DTYPES[datatype]
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype != dtype:
            raise TypeError(f"is an array of {value.dtype}")
        return np.asarray(value)
    if not isinstance(value, list | tuple | bool | int | float):
        raise TypeError(f"is {type(value).__name__}")
    natural = np.asarray(value)
    wanted = "f" if datatype is DataType.BF16 else dtype.kind  # ml_dtypes.bfloat16 is of numpy's kind V
    if natural.size and natural.dtype.kind not in _BECOMES[wanted]:
        raise TypeError(f"holds what numpy takes for {natural.dtype}")
    return natural.astype(dtype) if wanted == "f" or not natural.size else np.asarray(value, dtype=dtype)


def _as_text(value: Any) -> Array:
    """An object array of str and bytes."""
    array = np.asarray(value, dtype=np.object_)
    for element in array.reshape(-1).tolist():
        if not isinstance(element, str | bytes):
            raise TypeError(f"has an element of type {type(element).__name__}")
    return array


def _shape_problem(shape: tuple[int, ...], spec: TensorSpec, rows: int | None) -> str | None:
    if spec.shape is not None and (
        len(shape) != len(spec.shape)
        or any(wanted not in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True))
    ):
        return f"has shape {list(shape)}, expected {list(spec.shape)}"
    if rows is not None and shape[:1] != (rows,):
        return f"has shape {list(shape)}, expected {rows} rows, as many as the inputs have"
    return None


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Let the code in ``folder`` import what lies beside it, and leave no trace of it.

    Another version's ``helper.py`` must not be taken for this one's, so what came from the folder is forgotten
    afterwards (the model keeps what it imported); and no bytecode is written, because the repository is watched.
    """
    location, wrote_bytecode, before = str(folder), not sys.dont_write_bytecode, set(sys.modules)
    sys.path.insert(0, location)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if location in sys.path:  # the user's code may have changed the path itself
            sys.path.remove(location)
        sys.dont_write_bytecode = not wrote_bytecode
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder) and not name.startswith(_MODULE_PREFIX):
                del sys.modules[name]


def _imported(file: Path) -> ModuleType:
    # Kept in sys.modules, because pickle and dataclasses look there; never under a name that was used before.
    name = f"{_MODULE_PREFIX}{uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(folder: Path, what: str, call: Callable[[], Any]) -> Any:
    """The result of the user's code, whose every failure is a LoadError that says where it happened."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton_python_backend_utils":
            raise LoadError(
                "model.py is written for Triton's Python backend, which is not offered yet: it needs a class Model "
                "whose infer takes and returns dicts of arrays by tensor name"
            ) from error
        said = error.msg if isinstance(error, SyntaxError) else error
        raise LoadError(f"model.py {what}: {type(error).__name__}: {said} ({_place(error, folder)})") from error


def _place(error: BaseException, folder: Path) -> str:
    """The file and line of the user's code that were last on the way to ``error``."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


def _model_class(module: ModuleType) -> Any:
    model_class = getattr(module, "Model", None)
    if not isinstance(model_class, type):
        hint = (
            "; it has Triton's TritonPythonModel: rename it, let infer take and return dicts of arrays by tensor name"
            if hasattr(module, "TritonPythonModel")
            else ""
        )
        raise LoadError(f"model.py has no class Model{hint}")
    infer = getattr(model_class, "infer", None)
    if not callable(infer):
        raise LoadError("the class Model in model.py has no method infer(self, inputs)")
    for name in ("infer", "load", "unload"):
        method = getattr(model_class, name, None)
        if inspect.iscoroutinefunction(method):
            raise LoadError(f"Model.{name} is async, expected a plain method: {name}(self, ...)")
        if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
            raise LoadError(f"Model.{name} is a generator, and streamed answers are not offered yet")
    return model_class


def _signature(source: ModelSource, model_class: Any) -> Signature:
    problems: list[str] = []
    inputs = source.inputs or _declared(model_class, "inputs", problems)
    outputs = source.outputs or _declared(model_class, "outputs", problems)
    size = source.max_batch_size
    if size is None:
        size = getattr(model_class, "max_batch_size", 0)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            problems.append(f"Model.max_batch_size is {size!r}, expected a whole number, 0 where rows cannot be merged")
            size = 0
    problems += [
        f"max_batch_size is {size}, but '{spec.name}' has shape {list(spec.shape)}, expected -1 as its first dimension"
        for spec in (*inputs, *outputs)
        if size and spec.shape is not None and spec.shape[:1] != (-1,)
    ]
    if problems:
        raise LoadError("; ".join(problems))
    return Signature(inputs, outputs, size)


def _declared(model_class: Any, attribute: str, problems: list[str]) -> tuple[TensorSpec, ...]:
    """The tensors in a class attribute; what is wrong with it goes to ``problems``."""
    entries = getattr(model_class, attribute, None)
    if entries is None:
        problems.append(f"its {attribute} are not declared; {_HOW_TO_DECLARE}")
        return ()
    if not isinstance(entries, list | tuple) or not entries:
        problems.append(f"Model.{attribute} is {entries!r}, expected a list of dicts; {_HOW_TO_DECLARE}")
        return ()
    specs: list[TensorSpec] = []
    for index, entry in enumerate(entries):
        wrong = _entry_problem(entry, {spec.name for spec in specs})
        if wrong:
            problems.append(f"Model.{attribute}[{index}] {wrong}")
            continue
        shape = entry.get("shape")
        specs.append(
            TensorSpec(
                entry["name"],
                DATATYPE_BY_NAME[entry["datatype"]],
                None if shape is None else tuple(shape),
                entry.get("optional", False),
            )
        )
    return tuple(specs)


def _entry_problem(entry: Any, taken: set[str]) -> str | None:
    """What is wrong with one dict of a class's ``inputs`` or ``outputs``."""
    if not isinstance(entry, dict):
        return f"is {entry!r}, expected a dict with name, datatype and shape"
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    unknown = sorted(map(str, set(entry) - _SPEC_KEYS))
    problem = None
    if unknown:
        problem = f"has the unknown keys {unknown}, expected {sorted(_SPEC_KEYS)}"
    elif not isinstance(name, str) or not name or name in taken:
        problem = f"has the name {name!r}, expected a text that is not empty and not taken"
    elif not isinstance(datatype, str) or datatype not in DATATYPE_BY_NAME:
        problem = f"has the datatype {datatype!r}, expected one of {', '.join(DATATYPE_BY_NAME)}"
    elif shape is not None and not _is_shape(shape):
        problem = f"has the shape {shape!r}, expected a list of sizes, -1 for any"
    elif not isinstance(entry.get("optional", False), bool):
        problem = f"has optional {entry['optional']!r}, expected True or False"
    return problem


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(size) is int and size >= -1 for size in value)


__all__ = ["InputError", "ModelContext", "PythonBackend"]
