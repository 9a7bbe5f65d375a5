"""Where scikit-learn's trees send missing values (NaN): skl2onnx leaves that out, and they all went to the right."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator

_ENSEMBLES = ("TreeEnsembleClassifier", "TreeEnsembleRegressor")
_TRACKS = "nodes_missing_value_tracks_true"
_OWN = "sklearn."  # whose classes hold estimators though they are none themselves, as those that are calibrated
_ROUNDING = 1e-6  # of a threshold, which becomes a float of 32 bits

Flags = npt.NDArray[np.bool_]


def send_missing_as_fitted(made: Any, model: Any) -> None:
    """Have the trees of the ONNX model send missing values where those of the estimator do, in place.

    A tree is known by its features and thresholds; one that is nobody's stays as it is.
    """
    trees = list(_trees(model, set()))
    for node in made.graph.node:
        if node.op_type not in _ENSEMBLES:
            continue
        given = {one.name: one for one in node.attribute}
        owners, places = np.array(given["nodes_treeids"].ints), np.array(given["nodes_nodeids"].ints)
        features, values = np.array(given["nodes_featureids"].ints), _values(given)
        inner = np.array([mode != b"LEAF" for mode in given["nodes_modes"].strings])
        tracks = np.array(given[_TRACKS].ints if _TRACKS in given else [0] * len(owners), np.int64)
        for owner in np.unique(owners):
            own = owners == owner
            found = next(
                (one for one in trees if _is_same(one, places[own], inner[own], features[own], values[own])), None
            )
            if found is not None:
                tracks[own] = _to_the_left(found)[places[own]] & inner[own]
                trees = [*(one for one in trees if one is not found), found]  # of several alike the next comes next
        if _TRACKS in given:
            node.attribute.remove(given[_TRACKS])
        attribute = node.attribute.add()
        attribute.name, attribute.type = _TRACKS, attribute.INTS
        attribute.ints.extend(tracks.tolist())


def _trees(value: Any, seen: set[int]) -> Iterator[Any]:
    """The fitted trees in an estimator and in those that it holds, in their order."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, BaseEstimator) or (hasattr(value, "__dict__") and type(value).__module__.startswith(_OWN)):
        tree = getattr(value, "tree_", None)
        if tree is not None and hasattr(tree, "children_left"):
            yield tree
        parts: Any = vars(value).values()
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, np.ndarray) and value.dtype == object:
        parts = value.ravel().tolist()
    else:
        return
    for part in parts:
        yield from _trees(part, seen)


def _values(given: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Thresholds; of inputs of 64 bits they lie in a tensor."""
    from onnx import numpy_helper

    if "nodes_values_as_tensor" in given:
        return numpy_helper.to_array(given["nodes_values_as_tensor"].t).astype(np.float64)
    return np.array(given["nodes_values"].floats, np.float64)


def _is_same(tree: Any, places: Any, inner: Any, features: Any, values: Any) -> bool:
    if tree.node_count != len(places) or places.max(initial=0) >= tree.node_count:
        return False
    if not np.array_equal(tree.children_left[places] >= 0, inner):
        return False
    wanted = tree.threshold[places][inner]
    return np.array_equal(tree.feature[places][inner], features[inner]) and np.allclose(
        values[inner], wanted, rtol=_ROUNDING, atol=_ROUNDING * 1e-6
    )


def _to_the_left(tree: Any) -> Flags:
    nodes = tree.__getstate__()["nodes"]
    if "missing_go_to_left" not in (nodes.dtype.names or ()):  # an estimator of a scikit-learn that had no such thing
        return np.zeros(tree.node_count, np.bool_)
    return np.asarray(nodes["missing_go_to_left"], dtype=np.bool_)
