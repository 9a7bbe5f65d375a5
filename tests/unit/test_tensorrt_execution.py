"""Engines at work, on a GPU made of numpy: copies, profiles, graphs, outputs of unknown shape, failures, memory."""

import numpy as np
import pytest
from unit.tensorrt_fakes import BROKEN_CAPTURE, LOST, FakeDevice, FakeEngine, FakeLog, FakeTensor, fake_library

from headrace_backends.base import DeviceLost, InputError, LoadError
from headrace_backends.tensorrt import execution as module
from headrace_backends.tensorrt.execution import Execution, read_profiles, read_tensors

RANGE = ((1, 4), (8, 4), (32, 4))


def doubling(device, library, *ranges, **keywords):
    """y = 2 x."""
    tensors = [FakeTensor("x", "INPUT", (-1, 4), *(ranges or (RANGE,))), FakeTensor("y", "OUTPUT", (-1, 4))]
    return FakeEngine(device, library, tensors, lambda at: {"y": at["x"] * 2}, lambda shapes: {"y": shapes["x"]})


def running(engine, device, library, **keywords):
    tensors = read_tensors(engine)
    return Execution(library, engine, FakeLog(), device, tensors, read_profiles(engine, tensors), **keywords)


@pytest.fixture
def device():
    return FakeDevice()


def rows(count, start=0):
    return np.arange(start, start + 4 * count, dtype=np.float32).reshape(count, 4)


def test_batches_of_different_sizes_are_answered_and_everything_is_given_back(device):
    library = fake_library()
    execution = running(doubling(device, library), device, library)
    for count in (1, 32, 3, 8):
        np.testing.assert_array_equal(execution.run({"x": rows(count)})["y"], rows(count) * 2)
    execution.close()
    assert device.empty


def test_inputs_that_are_not_contiguous_are_copied_as_they_read(device):
    library = fake_library()
    execution = running(doubling(device, library), device, library)
    strided = np.arange(64, dtype=np.float32).reshape(8, 8)[::2, ::2]
    np.testing.assert_array_equal(execution.run({"x": strided})["y"], strided * 2)


def test_shapes_outside_of_every_profile_are_the_clients_fault(device):
    library = fake_library()
    execution = running(doubling(device, library), device, library)
    with pytest.raises(InputError, match=r"input 'x' has shape \[33, 4\], and the engine takes \[1, 4\] to \[32, 4\]"):
        execution.run({"x": rows(33)})
    np.testing.assert_array_equal(execution.run({"x": rows(1)})["y"], rows(1) * 2)


def test_each_profile_has_a_context_of_its_own(device):
    library = fake_library()
    engine = doubling(device, library, ((1, 4), (1, 4), (1, 4)), ((2, 4), (8, 4), (8, 4)))
    execution = running(engine, device, library)
    for count in (1, 4, 1, 8):
        np.testing.assert_array_equal(execution.run({"x": rows(count)})["y"], rows(count) * 2)
    assert [context.profile for context in engine.contexts] == [0, 1]
    # They run one at a time, in the same memory.
    assert len({context.workspace for context in engine.contexts}) == 1
    execution.close()
    assert device.empty


def test_what_is_refused_for_its_shape_takes_no_memory(device):
    library = fake_library()
    execution = running(doubling(device, library), device, library, cuda_graphs=True)
    for _ in range(3):
        execution.run({"x": rows(1)})
    used = device.used
    with pytest.raises(InputError):
        execution.run({"x": rows(4000)})
    assert device.used == used
    assert execution.graphs == 1  # which moving buffers would have ended


@pytest.mark.parametrize(
    ("words", "error"), [("no kernel for this GPU", RuntimeError), ("Cuda Runtime (out of memory)", MemoryError)]
)
def test_a_context_that_cannot_be_made_is_told_before_the_first_run(device, words, error):
    library = fake_library()
    engine = doubling(device, library)
    engine.create_execution_context = lambda _: None
    execution = running(engine, device, library)
    execution._log.lines.append(words)
    with pytest.raises(error, match=r"TensorRT 10\.13\.3\.9 cannot make an execution context: "):
        execution.make_ready()
    execution.close()
    assert device.empty


def test_no_rows_at_all(device):
    library = fake_library()
    execution = running(doubling(device, library, ((0, 4), (8, 4), (8, 4))), device, library)
    assert execution.run({"x": rows(0)})["y"].shape == (0, 4)
    assert "copy_in" not in device.log


# -- graphs -----------------------------------------------------------------------------------------------


def test_a_shape_that_comes_again_becomes_a_graph_and_answers_stay_right(device):
    library = fake_library()
    execution = running(doubling(device, library), device, library, cuda_graphs=True)
    execution.run({"x": rows(32)})  # the largest first: buffers do not grow any more
    for turn in range(4):
        for count in (4, 8):
            got = execution.run({"x": rows(count, start=turn)})["y"]
            np.testing.assert_array_equal(got, rows(count, start=turn) * 2)
    assert execution.graphs == 2
    assert device.log.count("launch") == 4
    # Other shapes, which change what their context keeps, do not touch what was captured.
    np.testing.assert_array_equal(execution.run({"x": rows(2)})["y"], rows(2) * 2)
    np.testing.assert_array_equal(execution.run({"x": rows(8, 9)})["y"], rows(8, 9) * 2)
    execution.close()
    assert device.empty


def test_graphs_are_dropped_when_buffers_move(device):
    library = fake_library()
    execution = running(doubling(device, library, ((1, 4), (8, 4), (64, 4))), device, library, cuda_graphs=True)
    for _ in range(3):
        execution.run({"x": rows(1)})
    assert execution.graphs == 1
    np.testing.assert_array_equal(execution.run({"x": rows(64)})["y"], rows(64) * 2)  # more than the buffers hold
    assert execution.graphs == 0
    for start in range(4):
        np.testing.assert_array_equal(execution.run({"x": rows(1, start)})["y"], rows(1, start) * 2)
    assert execution.graphs == 1


def test_graphs_are_bounded(device, monkeypatch):
    monkeypatch.setattr(module, "MAX_GRAPHS", 3)
    library = fake_library()
    execution = running(doubling(device, library), device, library, cuda_graphs=True)
    execution.run({"x": rows(32)})
    for count in range(1, 20):
        for _ in range(3):
            execution.run({"x": rows(count)})
        assert len(device.graphs) == execution.graphs <= 3


def test_what_cannot_be_captured_is_run_as_before_and_not_tried_again(device):
    library = fake_library()
    execution = running(doubling(device, library), device, library, cuda_graphs=True)
    device.fail_at["end_capture"] = BROKEN_CAPTURE
    for _ in range(5):
        np.testing.assert_array_equal(execution.run({"x": rows(2)})["y"], rows(2) * 2)
    assert device.log.count("begin_capture") == 1
    assert execution.graphs == 0


def test_a_capture_that_the_library_refuses_leaves_no_graph_behind(device):
    library = fake_library()
    engine = doubling(device, library)
    engine.capturable = False
    execution = running(engine, device, library, cuda_graphs=True)
    for _ in range(5):
        np.testing.assert_array_equal(execution.run({"x": rows(2)})["y"], rows(2) * 2)
    assert device.log.count("begin_capture") == device.log.count("end_capture") == 1
    assert not device.graphs


def test_rtx_is_asked_to_capture_by_itself(device):
    library = fake_library("tensorrt-rtx", "1.7.1.116")
    engine = doubling(device, library)
    execution = running(engine, device, library, cuda_graphs=True)
    for _ in range(4):
        execution.run({"x": rows(2)})
    assert engine.configs[0].cuda_graph_strategy == library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert "begin_capture" not in device.log


# -- outputs whose values decide their shape --------------------------------------------------------------


def nonzero(device, library):
    """What of x is above zero, in its order."""
    tensors = [
        FakeTensor("x", "INPUT", (-1,), ((1,), (8,), (64,))),
        FakeTensor("y", "OUTPUT", (-1,)),
        FakeTensor("twice", "OUTPUT", (-1,)),
    ]
    return FakeEngine(
        device,
        library,
        tensors,
        lambda at: {"y": at["x"][at["x"] > 0], "twice": at["x"] * 2},
        lambda shapes: {"y": (-1,), "twice": shapes["x"]},
    )


def test_outputs_of_unknown_shape_get_memory_while_the_engine_runs(device):
    library = fake_library()
    execution = running(nonzero(device, library), device, library, cuda_graphs=True)
    for values in ([1, -1, 2], [3] * 40, [-1], [5, 6]):
        x = np.array(values, np.float32)
        got = execution.run({"x": x})
        np.testing.assert_array_equal(got["y"], x[x > 0])
        np.testing.assert_array_equal(got["twice"], x * 2)
    assert "begin_capture" not in device.log
    execution.close()
    assert device.empty


def test_no_memory_for_such_an_output_is_told_as_that(device):
    library = fake_library()
    execution = running(nonzero(device, library), device, library)
    x = np.ones(32, np.float32)
    execution.run({"x": -x})
    device.gpu = type(device.gpu)(0, "Fake GPU", (8, 9), device.used)
    with pytest.raises(MemoryError, match="out of memory"):
        execution.run({"x": x})


# -- failures ---------------------------------------------------------------------------------------------


def test_a_run_that_the_library_refuses_tells_its_words(device):
    library = fake_library()
    engine = doubling(device, library)
    execution = running(engine, device, library)
    execution.run({"x": rows(1)})
    engine.contexts[0].refuses = True
    execution._log.lines.append("Error Code 1: Myelin")
    with pytest.raises(RuntimeError, match=r"TensorRT 10\.13\.3\.9 cannot run the engine: Error Code 1: Myelin"):
        execution.run({"x": rows(1)})
    engine.contexts[0].refuses = False
    np.testing.assert_array_equal(execution.run({"x": rows(1, 7)})["y"], rows(1, 7) * 2)


def test_out_of_memory_in_the_library_is_told_as_that(device):
    library = fake_library()
    engine = doubling(device, library)
    execution = running(engine, device, library)
    execution.run({"x": rows(1)})
    engine.contexts[0].refuses = True
    execution._log.lines.append("Error Code 2: OutOfMemory (Requested size was 8 bytes)")
    with pytest.raises(MemoryError, match="OutOfMemory"):
        execution.run({"x": rows(1)})


def test_a_lost_gpu_is_told_apart_even_where_the_library_names_something_else(device):
    library = fake_library()
    engine = doubling(device, library)
    execution = running(engine, device, library)
    execution.run({"x": rows(1)})
    engine.contexts[0].refuses = True
    device.fail_at["wait"] = LOST
    with pytest.raises(DeviceLost, match="CUDA_ERROR_LAUNCH_FAILED"):
        execution.run({"x": rows(1)})


def test_a_buffer_that_cannot_grow_is_empty_and_grows_later(device):
    library = fake_library()
    execution = running(doubling(device, library), device, library)
    execution.make_ready()
    used = device.used
    device.fail_at["allocate_pinned"] = MemoryError("no pinned memory")
    with pytest.raises(MemoryError):
        execution.run({"x": rows(1)})
    assert device.used == used
    del device.fail_at["allocate_pinned"]
    np.testing.assert_array_equal(execution.run({"x": rows(1)})["y"], rows(1) * 2)


# -- what an engine says of itself ------------------------------------------------------------------------


def test_shape_tensors_are_read_where_the_library_wants_them(device):
    library = fake_library()
    tensors = [
        FakeTensor("x", "INPUT", (-1, 4), RANGE),
        FakeTensor("n", "INPUT", (1,), ((1,), (1,), (1,)), kind="INT64", location="HOST"),
        FakeTensor("y", "OUTPUT", (-1, 4)),
    ]
    engine = FakeEngine(
        device, library, tensors, lambda at: {"y": at["x"] * at["n"][0]}, lambda shapes: {"y": shapes["x"]}
    )
    execution = running(engine, device, library, cuda_graphs=True)
    for factor in (2, 3, 5):
        got = execution.run({"x": rows(2), "n": np.array([factor])})
        np.testing.assert_array_equal(got["y"], rows(2) * factor)
    assert "begin_capture" not in device.log  # a graph would remember the factor


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layout": "CHW32"}, "memory layout CHW32, expected LINEAR"),
        ({"kind": "FP8"}, "is FP8, which the protocol has no datatype for"),
    ],
)
def test_tensors_that_cannot_be_served_are_named(device, more, message):
    library = fake_library()
    tensors = [FakeTensor("x", "INPUT", (-1, 4), RANGE, **more)]
    with pytest.raises(LoadError, match=f"'x' of the engine.*{message}"):
        read_tensors(FakeEngine(device, library, tensors, None, None))
