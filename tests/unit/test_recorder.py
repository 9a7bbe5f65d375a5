"""Which requests are recorded, for how long, and what becomes of it."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from headrace.core.errors import InvalidRequest, Kind, NotFound, Overloaded, Restricted
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.recording.recorder import MOST_AT_ONCE, Recorder, allowed_folder


class Models:
    """As much of a repository as the recorder asks."""

    def __init__(self, *names):
        self.served = {
            name: SimpleNamespace(folder=SimpleNamespace(name=name), version="3", max_batch_size=8) for name in names
        }

    def lookup(self, name, version):
        if name not in self.served or version not in ("", "3"):
            raise NotFound(f"no {name}")
        return self.served[name]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def models():
    return Models("m", *(f"m{number}" for number in range(MOST_AT_ONCE)))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def recorder(models, tmp_path, clock):
    recorder = Recorder(models, tmp_path, 1024, clock)
    yield recorder
    await recorder.close()


def rows(count, value=0.0):
    data = np.full((count, 1), value, np.float32).tobytes()
    return ModelInputs((Tensor("x", DataType.FP32, (count, 1), data),), count, None)


async def test_it_records_what_comes_while_it_is_asked_to(recorder, models, clock):
    served = models.served["m"]
    assert not recorder.active
    recorder.take(served, rows(1))  # before: not counted
    begun = recorder.start("m", "", 10, 60.0)
    assert (begun.state, begun.version, begun.seconds_left, begun.requests_seen) == ("recording", "3", 60.0, 0)
    assert recorder.active
    recorder.take(served, rows(1, 1.0))
    recorder.take(served, rows(3, 2.0))
    recorder.take(models.served["m0"], rows(1))  # nobody asked for that one
    clock.now += 20
    status = recorder.status("m", "3")
    assert (status.requests_seen, status.examples_seen, status.examples_kept, status.bytes_kept) == (2, 4, 4, 16)
    assert status.seconds_left == 40.0
    done = await recorder.stop("m", "")
    assert (done.state, done.examples_kept, done.reason) == ("written", 4, "")
    assert not recorder.active
    recorder.take(served, rows(1))
    assert recorder.status("m", "").requests_seen == 2
    with np.load(done.file) as found:
        assert found["x"].tolist() == [[1.0], [2.0], [2.0], [2.0]]
    assert str(recorder.file("m")) == done.file
    assert await recorder.stop("m", "") == done  # once more changes nothing


async def test_the_number_and_the_bytes_are_bounded(recorder, models):
    recorder.start("m", "", 5, 60.0)
    for _ in range(50):
        recorder.take(models.served["m"], rows(2))
    assert recorder.status("m", "").examples_kept == 5
    await recorder.stop("m", "")
    recorder.start("m", "", 60000, 60.0)
    for _ in range(50):
        recorder.take(models.served["m"], rows(100))
    status = recorder.status("m", "")
    assert status.examples_seen == 5000
    assert status.bytes_kept <= 1024


async def test_it_ends_by_itself(recorder, models):
    recorder.start("m", "", 5, 0.001)
    recorder.take(models.served["m"], rows(1))
    recording = recorder._recordings["m"]
    while recording.writing is None:
        await asyncio.sleep(0.001)
    await recording.writing
    assert recorder.status("m", "").state == "written"


async def test_without_traffic_there_is_no_file_and_a_reason(recorder):
    recorder.start("m", "", 5, 60.0)
    done = await recorder.stop("m", "")
    assert (done.state, done.file) == ("nothing", "")
    assert "no request came" in done.reason
    with pytest.raises(NotFound):
        recorder.file("m")


async def test_a_file_that_cannot_be_written_is_told(models, tmp_path, clock):
    (tmp_path / "recorded").write_text("in the way")
    recorder = Recorder(models, tmp_path, 1024, clock)
    recorder.start("m", "", 5, 60.0)
    recorder.take(models.served["m"], rows(1))
    done = await recorder.stop("m", "")
    assert done.state == "failed"
    assert "recorded" in done.reason


async def test_discarding_removes_everything(recorder, models):
    with pytest.raises(NotFound):
        await recorder.discard("m")
    recorder.start("m", "", 5, 60.0)
    recorder.take(models.served["m"], rows(1))
    file = (await recorder.stop("m", "")).file
    recorder.start("m", "", 5, 60.0)
    recorder.take(models.served["m"], rows(1))
    await recorder.discard("m")
    assert not recorder.active
    with pytest.raises(NotFound):
        recorder.file("m")
    with pytest.raises(NotFound):
        recorder.status("m", "")
    assert not Path(file).exists()  # noqa: ASYNC240 - a test


async def test_closing_writes_what_there_is(recorder, models):
    recorder.start("m", "", 5, 60.0)
    recorder.take(models.served["m"], rows(1))
    await recorder.close()
    assert recorder.file("m").is_file()


@pytest.mark.parametrize(
    ("examples", "seconds", "told"),
    [(0, 1.0, "'requests' is 0"), (65537, 1.0, "65536"), (1, 0.0, "'seconds' is 0"), (1, 1e9, "86400")],
)
async def test_bounds_that_make_no_sense_are_refused(recorder, examples, seconds, told):
    with pytest.raises(InvalidRequest, match=told):
        recorder.start("m", "", examples, seconds)


async def test_one_recording_of_a_model_and_a_few_in_all(recorder):
    with pytest.raises(NotFound):
        recorder.start("unknown", "", 5, 60.0)
    for number in range(MOST_AT_ONCE):
        recorder.start(f"m{number}", "", 5, 60.0)
    with pytest.raises(InvalidRequest, match="being recorded already"):
        recorder.start("m0", "", 5, 60.0)
    with pytest.raises(Overloaded, match="at most"):
        recorder.start("m", "", 5, 60.0)
    with pytest.raises(NotFound, match="version 7"):
        recorder.status("m0", "7")


async def test_where_it_is_not_allowed_everything_says_so(models):
    recorder = Recorder(models, None, 1024)
    for ask in (
        lambda: recorder.start("m", "", 5, 60.0),
        lambda: recorder.status("m", ""),
        lambda: recorder.file("m"),
    ):
        with pytest.raises(Restricted, match="--allow-recording") as caught:
            ask()
        assert caught.value.kind is Kind.RESTRICTED
    with pytest.raises(Restricted):
        await recorder.stop("m", "")
    with pytest.raises(Restricted):
        await recorder.discard("m")
    await recorder.close()


def test_a_folder_that_cannot_be_written_to_is_told_at_start(tmp_path):
    assert allowed_folder(tmp_path / "a" / "b", allowed=True) == tmp_path / "a" / "b"
    assert allowed_folder(tmp_path, allowed=False) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--plan-cache"):
        allowed_folder(tmp_path / "file" / "plans", allowed=True)
