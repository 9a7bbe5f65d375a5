"""Models of other frameworks as backends: converted when they are loaded, then ONNX Runtime's in every respect."""

from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar, Self

from headrace_backends import parameters
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.importers.conversion import converted
from headrace_backends.importers.formats import SKLEARN, TENSORFLOW, XGBOOST, Format
from headrace_backends.onnxruntime import PARAMETERS, OnnxRuntimeBackend


class ImportedBackend(OnnxRuntimeBackend):
    """One inference session of a file that was converted; takes ONNX Runtime's parameters besides its own."""

    format: ClassVar[Format]

    @classmethod
    def load(cls, source: ModelSource) -> Self:
        """Convert the model, or find it converted, and open that."""
        own = cls.format.own_parameters
        parameters.refuse_unknown(cls.format.backend, source.parameters, (*PARAMETERS, *own))
        rest = {name: value for name, value in source.parameters.items() if name not in own}
        with ExitStack() as holding:
            made = converted(source, cls.format, source.parameters, holding)
            try:
                backend = super().load(replace(source, path=made.path, parameters=rest))
            except LoadError as error:
                raise LoadError(f"'{source.path.name}', converted to ONNX: {error}") from error
        backend._notes[:0] = made.notes  # noqa: SLF001 - of this very class
        return backend


class TensorFlowBackend(ImportedBackend):
    """TensorFlow's SavedModels, and Keras's files."""

    format = TENSORFLOW


class SklearnBackend(ImportedBackend):
    """Scikit-learn's estimators and pipelines."""

    format = SKLEARN


class XgboostBackend(ImportedBackend):
    """XGBoost's boosters."""

    format = XGBOOST
