"""The ncnn backend: exact results, rows one by one, shapes from the file or the configuration, clear refusals."""

from random import Random

import numpy as np
import pytest

pytest.importorskip("ncnn", reason="ncnn is not installed: pip install 'headrace[ncnn]'")

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends import threads
from headrace_backends.base import InputError, LoadError, ModelSource
from headrace_backends.ncnn import backend as ncnn
from headrace_backends.ncnn.backend import NcnnBackend

WEIGHTS = np.random.default_rng(3).standard_normal((3, 30)).astype(np.float32)
BIAS = np.array([1, 2, 3], np.float32)
ROWS = np.random.default_rng(4).standard_normal((7, 2, 3, 5)).astype(np.float32)
RIGHT = np.maximum(ROWS, 0).reshape(7, 30) @ WEIGHTS.T + BIAS
# The first layer writes to its input, where it may.
TOLD = """7767517
3 3
Input image 0 1 image 0=5 1=3 2=2
ReLU relu 1 1 image rectified
InnerProduct dense 1 1 rectified scores 0=3 1=1 2=90
"""
UNTOLD = TOLD.replace("0=5 1=3 2=2", "")
MEANS = "7767517\n3 3\nInput a 0 1 a\nInput b 0 1 b\nBinaryOp add 2 1 a b sum 0=0\n"


def written(folder, text=TOLD, name="model"):
    path = folder / f"{name}.param"
    path.write_text(text)
    kind = np.zeros(1, np.uint32).tobytes()  # FP32
    path.with_suffix(".bin").write_bytes(kind + WEIGHTS.tobytes() + BIAS.tobytes() if "dense" in text else b"")
    return path


def load(path, **keywords):
    return NcnnBackend.load(ModelSource("m", "1", path, **keywords))


def shaped(name, *shape):
    return TensorSpec(name, DataType.FP32, shape)


def test_results_and_what_the_files_say(tmp_path):
    backend = load(written(tmp_path))
    assert backend.signature.inputs == (shaped("image", -1, 2, 3, 5),)
    assert backend.signature.outputs == (shaped("scores", -1, 3),)
    for count in (7, 1, 3):
        answer = backend.execute({"image": ROWS[:count]}, [])["scores"]
        np.testing.assert_allclose(answer, RIGHT[:count], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(backend.execute({"image": ROWS[::2]}, [])["scores"], RIGHT[::2], rtol=1e-5, atol=1e-5)


def test_inputs_are_only_read_and_answers_are_the_callers(tmp_path):
    backend = load(written(tmp_path))
    given = ROWS.copy()
    given.flags.writeable = False
    first = backend.execute({"image": given}, [])["scores"]
    kept = first.copy()
    backend.execute({"image": -ROWS}, [])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(given, ROWS)


def test_requests_are_merged_only_where_that_is_configured(tmp_path):
    backend = load(written(tmp_path))
    assert backend.signature.max_batch_size == 0
    assert any(note.startswith("requests are not merged into batches: ncnn runs one row") for note in backend.notes())
    assert load(written(tmp_path), max_batch_size=8).signature.max_batch_size == 8


def test_shapes_that_the_file_does_not_tell_are_configured(tmp_path):
    path = written(tmp_path, UNTOLD)
    with pytest.raises(LoadError, match=r"'model\.param' does not tell the shape of .image.; configure it"):
        load(path)
    backend = load(path, inputs=(shaped("image", -1, 2, 3, 5),))
    assert backend.signature.outputs == (shaped("scores", -1, 3),)
    np.testing.assert_allclose(backend.execute({"image": ROWS}, [])["scores"], RIGHT, rtol=1e-5, atol=1e-5)
    for shape in ((2, 3, 5), (-1,), (-1, 2, 3, 5, 1, 1)):
        with pytest.raises(LoadError, match=r"configured with shape .*; its first dimension is to be that of the rows"):
            load(path, inputs=(shaped("image", *shape),))


def test_dimensions_of_any_size(tmp_path):
    path = written(tmp_path, "7767517\n2 2\nInput x 0 1 x\nReLU relu 1 1 x y\n")
    backend = load(path, inputs=(shaped("x", -1, 2, -1),))
    assert backend.signature.outputs == (TensorSpec("y", DataType.FP32, None),)
    for width in (3, 8):
        row = np.linspace(-1, 1, 2 * width, dtype=np.float32).reshape(1, 2, width)
        np.testing.assert_array_equal(backend.execute({"x": row}, [])["y"], np.maximum(row, 0))


def test_several_inputs(tmp_path):
    backend = load(written(tmp_path, MEANS), inputs=(shaped("a", -1, 4), shaped("b", -1, 4)))
    one, other = np.arange(16, dtype=np.float32).reshape(2, 2, 4)
    np.testing.assert_array_equal(backend.execute({"a": one, "b": other}, [])["sum"], one + other)
    with pytest.raises(InputError, match=r"different numbers of rows: \{'a': 2, 'b': 1\}"):
        backend.execute({"a": one, "b": other[:1]}, [])


def test_no_rows(tmp_path):
    with pytest.raises(InputError, match="there are no rows"):
        load(written(tmp_path)).execute({"image": ROWS[:0]}, [])


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 6), (3000,)])
def test_a_configured_shape_that_the_weights_are_not_for(tmp_path, shape):
    """ncnn would compute with whatever lies behind the weights in memory, or die of it."""
    with pytest.raises(LoadError, match=r"layer 'dense' \(InnerProduct\) is given .*, and its weights are those of 30"):
        load(written(tmp_path, UNTOLD), inputs=(shaped("image", -1, *shape),))


def test_requested_sizes_that_the_weights_are_not_for(tmp_path):
    backend = load(written(tmp_path, UNTOLD), inputs=(shaped("image", -1, -1, 3, 5),))
    np.testing.assert_allclose(backend.execute({"image": ROWS}, [])["scores"], RIGHT, rtol=1e-5, atol=1e-5)
    for count in (1, 3, 4000):
        with pytest.raises(InputError, match=rf"layer 'dense' \(InnerProduct\) is given \[{count}, 3, 5\], and its"):
            backend.execute({"image": np.ones((1, count, 3, 5), np.float32)}, [])
    np.testing.assert_allclose(backend.execute({"image": ROWS}, [])["scores"], RIGHT, rtol=1e-5, atol=1e-5)


def test_requested_sizes_that_do_not_go_together(tmp_path):
    backend = load(written(tmp_path, MEANS), inputs=(shaped("a", -1, -1), shaped("b", -1, -1)))
    with pytest.raises(InputError, match=r"'add' \(BinaryOp\) is given \[4\] and \[5\], and their sizes do not go"):
        backend.execute({"a": np.ones((1, 4), np.float32), "b": np.ones((1, 5), np.float32)}, [])


def test_rows_without_elements(tmp_path):
    backend = load(written(tmp_path, "7767517\n2 2\nInput x 0 1 x\nReLU relu 1 1 x y\n"), inputs=(shaped("x", -1, -1),))
    with pytest.raises(InputError, match=r"input 'x' has rows of shape \[0\]; ncnn takes no empty ones"):
        backend.execute({"x": np.ones((2, 0), np.float32)}, [])


def test_a_picture_smaller_than_what_it_is_pooled_by(tmp_path):
    text = "7767517\n2 2\nInput x 0 1 x\nPooling pool 1 1 x y 0=0 1=3 2=1 5=1\n"
    backend = load(written(tmp_path, text), inputs=(shaped("x", -1, 1, -1, -1),))
    with pytest.raises(InputError, match=r"'pool' \(Pooling\) is given \[1, 2, 2\], and nothing is left of them"):
        backend.execute({"x": np.ones((1, 1, 2, 2), np.float32)}, [])


def test_sizes_that_have_been_looked_at_are_remembered_up_to_a_bound(tmp_path, monkeypatch):
    looked, whole = [], ncnn.refusal
    monkeypatch.setattr(ncnn, "_MOST_SHAPES", 2)
    monkeypatch.setattr(ncnn, "refusal", lambda layer, given: looked.append(given) or whole(layer, given))
    backend = load(written(tmp_path, MEANS), inputs=(shaped("a", -1, -1), shaped("b", -1, -1)))
    looked.clear()
    for size in (3, 3, 4, 3, 5, 6, 3):  # with what was tried while it loaded, never more than two are remembered
        backend.execute({"a": np.ones((1, size), np.float32), "b": np.ones((1, size), np.float32)}, [])
    assert [given[0] for given in looked][:2] == [(3,), (4,)]
    assert [given[0] for given in looked].count((3,)) > 1


def test_one_row_only(tmp_path):
    """As a config.pbtxt without batches has it: every shape whole."""
    path = written(tmp_path, UNTOLD)
    for outputs in ((), (shaped("scores", 1, 3),), (shaped("scores", -1, 3),)):
        backend = load(path, inputs=(shaped("image", 1, 2, 3, 5),), outputs=outputs)
        assert backend.signature.inputs == (shaped("image", 1, 2, 3, 5),)
        assert backend.signature.outputs == (outputs or (shaped("scores", 1, 3),))


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ((shaped("scores", -1, 4),), r"output 'scores' is configured as \[-1, 4\]; it is \[-1, 3\]"),
        ((shaped("classes", -1, 3),), r"the file has no output 'classes'; it has \['scores'\]"),
        ((TensorSpec("scores", DataType.INT64, (-1, 3)),), "'scores' is configured as INT64; the file has FP32"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path, outputs, why):
    with pytest.raises(LoadError, match=why):
        load(written(tmp_path), outputs=outputs)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ncnn", r"'model\.param' is no ncnn model: it does not begin with 7767517"),
        (TOLD.replace("ReLU", "NoSuchLayer"), "layer 'relu' is a NoSuchLayer, a kind that is not served"),
        (
            TOLD.replace("2=90", "2=900"),
            r"'model\.bin' does not have the weights .* it ends in the weights of layer 'dense'",
        ),
        (TOLD.replace("2=90", "2=60"), r"'model\.bin' .*: it has 376 bytes, and its layers read 256 of them"),
        (TOLD.replace("2=90", "2=-90"), r"layer 'dense' \(InnerProduct\) has -90 weights by its options"),
        (TOLD.replace("1=1 2=90", "1=3 2=90"), r"layer 'dense' \(InnerProduct\) has 1=3, expected 0 or 1"),
        (TOLD.replace("0=5", "0=2147483647"), "input 'image' has the shape .*; a row has 268435456 numbers at most"),
        (TOLD.replace("0=5", "0=99999999999"), "has '99999999999' where a whole number is expected"),
        (TOLD.replace("0=5", "0=-5"), "layer 'image' .* has sizes that are none: 0=-5 1=3 2=2"),
        (
            TOLD.replace("1 1 image rectified", "1 1 scores rectified"),
            "reads 'scores', which is written by none before",
        ),
        (
            TOLD.replace("1 1 rectified scores", "1 1 image scores"),
            "reads 'image', which is read by two layers, without",
        ),
        ("7767517\n0 0\n", "has 0 inputs and 0 outputs"),
    ],
)
def test_files_that_are_no_model(tmp_path, text, why):
    with pytest.raises(LoadError, match=why):
        load(written(tmp_path, text))


def test_files_that_are_not_there_or_no_text(tmp_path):
    path = written(tmp_path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(LoadError, match=r"needs its weights beside it, in 'model\.bin'"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="it is no text"):
        load(path)
    with pytest.raises(LoadError, match=r"cannot read .none\.param.: No such file"):
        load(tmp_path / "none.param")


def test_weights_of_8_bits_where_others_are_expected(tmp_path):
    """ncnn takes the file, and reads four times as much as there is."""
    path = written(tmp_path)
    weights = path.with_suffix(".bin")
    weights.write_bytes(0x000D4B38.to_bytes(4, "little") + bytes(92) + BIAS.tobytes())
    with pytest.raises(LoadError, match=r"those of layer 'dense' \(InnerProduct\) are kept in 8 bits, and it is not"):
        load(path)


def test_weights_of_16_bits(tmp_path):
    path = written(tmp_path)
    halves = 0x01306B47.to_bytes(4, "little") + WEIGHTS.astype(np.float16).tobytes()
    path.with_suffix(".bin").write_bytes(halves + BIAS.tobytes())
    np.testing.assert_allclose(load(path).execute({"image": ROWS}, [])["scores"], RIGHT, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_or_run(tmp_path, seed):
    """Whatever single thing is changed. None of it takes the process along, or raises anything but a refusal."""
    random, words = Random(seed), TOLD.split(" ")
    numbers = ["-1", "0", "1", "7", "-233", "65536", "2147483647", "-2147483648", "0.5", "nan", "", "x", "1,2", '"0w"']
    for _ in range(100):
        place = random.randrange(len(words))
        key, equals, _ = words[place].partition("=")
        changed = f"{key}={random.choice(numbers)}" if equals else random.choice([*words, *numbers])
        path = written(tmp_path, " ".join([*words[:place], changed, *words[place + 1 :]])[: random.randrange(400)])
        try:
            backend = load(path)
            backend.execute(
                {one.name: np.ones((2, *one.shape[1:]), np.float32) for one in backend.signature.inputs}, []
            )
        except (LoadError, InputError):
            continue


@pytest.mark.parametrize(
    ("keywords", "why"),
    [
        ({"parameters": {"precision": "f8"}}, r"parameters\.precision is 'f8', expected one of f32, bf16"),
        ({"parameters": {"vulkan": True}}, "the backend ncnn has no parameter 'vulkan'"),
        ({"device": "gpu:0"}, "device 'gpu:0' is not one for the backend ncnn"),
    ],
)
def test_parameters(tmp_path, keywords, why):
    with pytest.raises(LoadError, match=why):
        load(written(tmp_path), **keywords)


def test_bf16_is_coarser(tmp_path):
    answer = load(written(tmp_path), parameters={"precision": "bf16"}).execute({"image": ROWS}, [])["scores"]
    errors = np.abs(answer - RIGHT) / np.abs(RIGHT).max()
    assert 1e-5 < errors.max() < 2e-2


@pytest.mark.parametrize(
    ("kind", "options", "fits"),
    [
        ("ConvolutionDepthWise", "0=4 1=3 6=36 7=4", True),
        ("ConvolutionDepthWise", "0=8 1=3 6=144 7=2", False),
        ("ConvolutionDepthWise", "0=8 1=3 6=72 7=4", False),
        ("ConvolutionDepthWise", "0=4 1=3 6=36 7=4 31=4", False),
        ("Convolution", "0=4 1=3 6=144", True),
    ],
)
def test_convolutions_in_groups_are_not_for_bf16(tmp_path, kind, options, fits):
    """Of memory that is not its own ncnn makes what the answer is then."""
    weights = int(options.split("6=")[1].split()[0])
    path = tmp_path / "model.param"
    path.write_text(f"7767517\n2 2\nInput x 0 1 x 0=9 1=8 2=4\n{kind} it 1 1 x y {options}\n")
    path.with_suffix(".bin").write_bytes(bytes(4 + 4 * weights))
    load(path)
    if fits:
        load(path, parameters={"precision": "bf16"})
        return
    with pytest.raises(LoadError, match=rf"layer 'it' \({kind}\) is one that ncnn computes wrongly in bf16: leave pre"):
        load(path, parameters={"precision": "bf16"})


def test_threads(tmp_path, monkeypatch):
    light = load(written(tmp_path), threads=2)
    assert light.cpu_threads == 0
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 0.0)
    heavy = load(written(tmp_path), threads=2)
    assert heavy.cpu_threads == 2
    np.testing.assert_allclose(heavy.execute({"image": ROWS}, [])["scores"], RIGHT, rtol=1e-5, atol=1e-5)
