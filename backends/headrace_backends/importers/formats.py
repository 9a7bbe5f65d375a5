"""Which formats are made ONNX, by what, and what has to be installed for it. Imports no framework."""

from dataclasses import dataclass, field
from importlib.util import find_spec

from headrace_backends.base import BackendUnavailable
from headrace_backends.distributions import installed

SAVED_MODEL = "saved_model.pb"  # in the folder that is a SavedModel


@dataclass(frozen=True, slots=True)
class Format:
    """One framework's models.

    ``converters`` are ``module:function`` by the ending of the file; ``packages`` the distributions that they need, by
    the name that each is imported as; ``own_packages`` what only some endings need besides.
    """

    backend: str
    framework: str  # as people call it
    extra: str
    converters: dict[str, str]
    packages: dict[str, str]
    parameters: tuple[str, ...] = ()
    own_packages: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files that it is about."""
        return tuple(self.converters)

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """Those of a model's that are about its conversion, and not about how the ONNX file runs."""
        return (*self.parameters, "conversion_cache")

    def versions(self, ending: str) -> dict[str, str]:
        """The versions of what converts such a file, by distribution.

        Raises:
            BackendUnavailable: something of it is not installed.
        """
        needed = {**self.packages, **self.own_packages.get(ending, {})}
        missing = [name for module, name in needed.items() if find_spec(module) is None]
        if missing:
            raise BackendUnavailable(
                f"{self.framework} models are converted to ONNX with {_listed(list(needed.values()))}, and "
                f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
                f"install with: pip install 'headrace[{self.extra}]'"
            )
        return {name: installed(name)[1] or "unknown" for name in needed.values()}


_SHARED = {"onnx": "onnx", "onnxruntime": "onnxruntime"}

TENSORFLOW = Format(
    "tensorflow",
    "TensorFlow",
    "tensorflow",
    {
        ".savedmodel": "headrace_backends.importers.savedmodel:convert",
        ".pb": "headrace_backends.importers.savedmodel:convert",
        ".keras": "headrace_backends.importers.keras_file:convert",
        ".h5": "headrace_backends.importers.keras_file:convert",
    },
    {"tensorflow": "tensorflow", "tf2onnx": "tf2onnx", **_SHARED},
    ("signature", "tag"),
    {".keras": {"keras": "keras"}, ".h5": {"keras": "keras"}},
)
SKLEARN = Format(
    "sklearn",
    "scikit-learn",
    "sklearn",
    {
        ".skops": "headrace_backends.importers.estimator:convert",
        ".joblib": "headrace_backends.importers.estimator:convert",
        ".pkl": "headrace_backends.importers.estimator:convert",
        ".pickle": "headrace_backends.importers.estimator:convert",
    },
    {"sklearn": "scikit-learn", "skl2onnx": "skl2onnx", **_SHARED},
    ("allow_pickle", "trusted_types"),
    {".skops": {"skops": "skops"}},
)
XGBOOST = Format(
    "xgboost",
    "XGBoost",
    "xgboost",
    {
        ".json": "headrace_backends.importers.booster:convert",
        ".ubj": "headrace_backends.importers.booster:convert",
        ".bst": "headrace_backends.importers.booster:convert",
    },
    {"xgboost": "xgboost", "onnxmltools": "onnxmltools", **_SHARED},
)

FORMATS: dict[str, Format] = {one.backend: one for one in (TENSORFLOW, SKLEARN, XGBOOST)}


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
