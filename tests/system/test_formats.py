"""Models of other frameworks, dropped in as they are: the framework's own answers over both protocols, and refusals."""

import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http
from running_server import RunningServer
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PIXELS, DIGITS = load_digits(return_X_y=True)
ROWS = PIXELS[:9].astype(np.float32)
WEIGHTS = np.random.default_rng(3).standard_normal((64, 3)).astype(np.float32)


def installed(*modules):
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_sklearn = installed("sklearn", "skl2onnx", "onnx")
needs_xgboost = installed("xgboost", "onnxmltools", "onnx")
needs_litert = installed("ai_edge_litert")
needs_tensorflow = installed("tensorflow", "keras", "tf2onnx", "onnx", "ai_edge_litert")


def ask_http(server, name, given):
    tensors = []
    for key, array in given.items():
        tensors.append(tritonclient.http.InferInput(key, array.shape, "FP32"))
        tensors[-1].set_data_from_numpy(array, binary_data=True)
    client = tritonclient.http.InferenceServerClient(server.http, network_timeout=60, connection_timeout=60)
    try:
        result = client.infer(name, tensors)
        return {one["name"]: result.as_numpy(one["name"]) for one in result.get_response()["outputs"]}
    finally:
        client.close()


def ask_grpc(server, name, given):
    tensors = []
    for key, array in given.items():
        tensors.append(tritonclient.grpc.InferInput(key, array.shape, "FP32"))
        tensors[-1].set_data_from_numpy(array)
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        result = client.infer(name, tensors)
        return {one.name: result.as_numpy(one.name) for one in result.get_response().outputs}


BOTH = pytest.mark.parametrize("ask", [ask_http, ask_grpc], ids=["http", "grpc"])


def place(repository, name, content=b"", config=""):
    """A path for the model's file, with its folder there."""
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content:
        path.write_bytes(content)
    if config:
        (path.parents[1] / "config.yaml").write_text(config)
    return path


def ready(server):
    """The server once it has loaded everything, then its end. Frameworks are imported for each model meanwhile."""
    try:
        server.wait_ready(900)
        yield server
    finally:
        server.__exit__()


def reasons(server):
    status, index = server.post("/v2/repository/index", {})
    assert status == 200
    return {one["name"]: one.get("reason", "") for one in index if one["state"] == "UNAVAILABLE"}


# -- scikit-learn, XGBoost, LiteRT ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(PIXELS, DIGITS)


@pytest.fixture(scope="module")
def booster():
    import xgboost

    parameters = {"objective": "multi:softprob", "num_class": 10, "max_depth": 3, "nthread": 1}
    return xgboost.train(parameters, xgboost.DMatrix(PIXELS, label=DIGITS), 3)


@pytest.fixture(scope="module")
def server(tmp_path_factory, classifier, booster):
    from tflite_nets import linear

    repository = tmp_path_factory.mktemp("formats")
    pickled = pickle.dumps(classifier)
    place(repository, "digits_sklearn/1/model.joblib", pickled, "parameters: {allow_pickle: true}")
    place(repository, "not_agreed/1/model.pkl", pickled)
    place(repository, "not_fitted/1/model.pkl", pickle.dumps(LogisticRegression()), "parameters: {allow_pickle: true}")
    booster.save_model(place(repository, "digits_xgboost/1/model.ubj"))
    place(repository, "half/1/model.ubj", (repository / "digits_xgboost/1/model.ubj").read_bytes()[:300])
    linear(place(repository, "linear/1/model.tflite"), WEIGHTS)
    place(repository, "no_tflite/1/model.tflite", b"<html>")
    if find_spec("tensorflow") is None:
        place(repository, "uninstalled/1/model.keras", b"k")
    cache = tmp_path_factory.mktemp("cache")
    repository.joinpath(".cache").symlink_to(cache / "headrace/conversions")  # hidden: for the tests to look at
    flags = ("--model-control", "explicit", "--load-model", "*")
    yield from ready(RunningServer(repository, *flags, env={"XDG_CACHE_HOME": str(cache)}))


@needs_sklearn
@needs_xgboost
@needs_litert
class TestTabular:
    @BOTH
    def test_scikit_learn(self, server, classifier, ask):
        answered = ask(server, "digits_sklearn", {"features": ROWS})
        np.testing.assert_array_equal(answered["label"], classifier.predict(ROWS))
        np.testing.assert_allclose(answered["probabilities"], classifier.predict_proba(ROWS), atol=1e-5)

    @BOTH
    def test_xgboost(self, server, booster, ask):
        import xgboost

        answered = ask(server, "digits_xgboost", {"features": ROWS})
        wanted = booster.predict(xgboost.DMatrix(ROWS))
        np.testing.assert_allclose(answered["probabilities"], wanted, atol=1e-5)
        np.testing.assert_array_equal(answered["label"], wanted.argmax(axis=1))

    @BOTH
    def test_litert(self, server, ask):
        answered = ask(server, "linear", {"x": ROWS})
        np.testing.assert_allclose(answered["y"], ROWS @ WEIGHTS, rtol=1e-4, atol=1e-3)

    def test_metadata(self, server):
        status, metadata = server.get("/v2/models/digits_sklearn")
        assert (status, metadata["platform"]) == (200, "sklearn")
        assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 64]}]
        assert [one["name"] for one in metadata["outputs"]] == ["label", "probabilities"]
        assert server.get("/v2/models/digits_xgboost/config")[1]["max_batch_size"] == 32

    def test_what_is_wrong_is_told_and_the_others_are_served(self, server):
        told = reasons(server)
        assert set(told) - {"uninstalled"} == {"not_agreed", "not_fitted", "half", "no_tflite"}
        assert "'model.pkl' is a pickle, which could run any code and is not opened" in told["not_agreed"]
        assert "'model.pkl' does not say how many features it takes: is it fitted?" in told["not_fitted"]
        assert "'model.ubj' is no model of XGBoost, in JSON or UBJSON" in told["half"]
        assert "'model.tflite' is no TensorFlow Lite model" in told["no_tflite"]

    @pytest.mark.skipif(find_spec("tensorflow") is not None, reason="TensorFlow is installed")
    def test_what_has_to_be_installed_is_told(self, server):
        assert "install with: pip install 'headrace[tensorflow]'" in reasons(server)["uninstalled"]

    def test_a_model_that_comes_again_is_not_converted_again(self, server):
        cache = server.repository / ".cache"
        kept = {path: path.stat().st_ino for path in cache.glob("*/model.onnx")}
        assert len(kept) == 2
        for call in ("unload", "load"):
            assert server.post(f"/v2/repository/models/digits_sklearn/{call}", {})[0] == 200
        assert {path: path.stat().st_ino for path in cache.glob("*/model.onnx")} == kept
        assert list(cache.glob(".new-*")) == []


# -- TensorFlow --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensorflow_models")
    maker = Path(__file__).parents[1] / "tensorflow_models.py"
    done = subprocess.run([sys.executable, maker, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def tensorflow_server(tmp_path_factory, made):
    repository = tmp_path_factory.mktemp("tensorflow")
    (repository / "net_served").mkdir()
    (made / "net.savedmodel").rename(repository / "net_served/1")  # as TensorFlow Serving's repositories have it
    (repository / "signatures/1").mkdir(parents=True)
    (made / "signatures").rename(repository / "signatures/1/model.savedmodel")
    (repository / "signatures/config.pbtxt").write_text(
        'platform: "tensorflow_savedmodel" parameters { key: "TF_SIGNATURE_DEF" value { string_value: "minus" } }'
    )
    (repository / "none/1").mkdir(parents=True)
    (made / "none").rename(repository / "none/1/model.savedmodel")
    for name, file in (("net_keras", "net.keras"), ("two", "two.keras"), ("lambda", "lambda.keras"), ("h5", "net.h5")):
        place(repository, f"{name}/1/model.{file.split('.')[1]}", (made / file).read_bytes())
    place(repository, "net_tflite/1/model.tflite", (made / "net.tflite").read_bytes())
    place(repository, "torn/1/model.keras", (made / "net.keras").read_bytes()[:200])
    cache = tmp_path_factory.mktemp("cache")
    yield from ready(RunningServer(repository, env={"XDG_CACHE_HOME": str(cache)}))


@needs_tensorflow
class TestTensorFlow:
    @BOTH
    @pytest.mark.parametrize(
        ("name", "output"),
        [("net_keras", "shares"), ("h5", "shares"), ("net_served", "output_0"), ("net_tflite", "output_0")],
    )
    def test_one_net_in_each_form(self, tensorflow_server, made, ask, name, output):
        told = np.load(made / "net.npz")
        answered = ask(tensorflow_server, name, {"image": told["image"]})
        np.testing.assert_allclose(answered[output], told["shares"], atol=1e-5)

    @BOTH
    def test_tensors_are_named_as_the_signature_names_them(self, tensorflow_server, ask):
        minuend, amount = np.array([[3, 4], [5, 6]], np.float32), np.array([[1, 1], [2, 9]], np.float32)
        answered = ask(tensorflow_server, "signatures", {"minuend": minuend, "amount": amount})
        np.testing.assert_allclose(answered["difference"], minuend - amount)
        np.testing.assert_allclose(answered["first"], [3, 5])

    def test_several_inputs_and_outputs_of_keras(self, tensorflow_server):
        left, right = np.ones((2, 3), np.float32), np.full((2, 2), 2, np.float32)
        answered = ask_http(tensorflow_server, "two", {"left": left, "right": right})
        assert answered["price"].shape == (2, 1)
        np.testing.assert_array_equal(answered["joined"], np.concatenate([left, right], axis=1))

    def test_metadata(self, tensorflow_server):
        status, metadata = tensorflow_server.get("/v2/models/net_served")
        assert (status, metadata["platform"]) == (200, "tensorflow_savedmodel")
        assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 8, 8, 1]}]
        assert tensorflow_server.get("/v2/models/net_served/config")[1]["max_batch_size"] == 32

    def test_what_is_wrong_is_told(self, tensorflow_server):
        told = reasons(tensorflow_server)
        assert set(told) == {"lambda", "none", "torn"}
        assert "Keras cannot load 'model.keras': it is not a zip file" in told["torn"]
        assert "Keras cannot load 'model.keras'" in told["lambda"]
        assert "save the model with model.export(FOLDER), and serve that SavedModel" in told["lambda"]
        assert "has no signature" in told["none"]

    def test_weights_that_one_file_does_not_hold_lie_beside_it(self, tensorflow_server, made, tmp_path):
        code = (
            "import sys; from pathlib import Path; from headrace_backends.importers.savedmodel import write_onnx; "
            "write_onnx(Path(sys.argv[1]), Path(sys.argv[2]), 'serving_default', 'serve', large=True)"
        )
        saved, target = tensorflow_server.repository / "net_served/1", tmp_path / "model.onnx"
        done = subprocess.run([sys.executable, "-c", code, saved, target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list(tmp_path.iterdir())) > 1
        told = np.load(made / "net.npz")
        (answered,) = onnxruntime.InferenceSession(target).run(None, {"image": told["image"]})
        np.testing.assert_allclose(answered, told["shares"], atol=1e-5)
