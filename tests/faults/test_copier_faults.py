"""The process that holds clients' GPU memory: lost, hung and overrun; its driver is a libcuda of our own."""

import asyncio
import gc
import os
from pathlib import Path

import psutil
import pytest
from fake_libcuda import LentFile, make_libcuda

import headrace.cuda_memory.process
from headrace.core.errors import NotFound, NotReady, Overloaded
from headrace.core.request import Place
from headrace.cuda_memory import frames
from headrace.cuda_memory.process import CopierProcess
from headrace.cuda_memory.regions import CudaRegions

GPU = 1  # the other one does not work


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    made = tmp_path_factory.mktemp("libraries")
    make_libcuda(made)
    return made


@pytest.fixture
def driver_says(libraries, tmp_path, monkeypatch):
    """The file that has the status of one of the driver's calls; -1 does not come back."""
    says = tmp_path / "says"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    monkeypatch.setenv("FAKE_CUDA", f"@{says}")
    return says


@pytest.fixture
async def regions(driver_says):
    made = CudaRegions(True)
    yield made
    await made.close()
    assert holders() == []


@pytest.fixture
def lent():
    with LentFile(100) as memory:
        memory.write(0, b"hello")
        yield memory


def holders():
    children = psutil.Process().children()
    return [one for one in children if one.is_running() and "headrace.cuda_memory.copier" in one.cmdline()]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


async def read(regions):
    return bytes(await regions.read(Place("r", 0, 5)))


async def test_a_copy_that_hangs_ends_its_process_and_what_waits_behind_it(regions, driver_says, lent, caplog):
    await regions.register("r", lent.handle, GPU, 100)
    assert await read(regions) == b"hello"
    (holder,) = holders()
    driver_says.write_text("cuMemcpyDtoHAsync_v2=-1")
    regions.copier.answer_timeout_s = 0.3
    waiting = [asyncio.ensure_future(read(regions)) for _ in range(3)]
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in answers] == [NotReady] * 3
    assert (
        "'r' cannot be read: the process that holds the memory of GPUs has ended: it gave no answer within 0.3 s"
        in (str(answers[0]))
    )
    with pytest.raises(NotFound, match="'r' is gone, because the process that held it ended: it gave no answer"):
        await read(regions)
    assert "has ended: it gave no answer within 0.3 s" in caplog.text
    driver_says.write_text("")
    regions.copier.answer_timeout_s = 60
    await regions.register("r", lent.handle, GPU, 100)
    assert await read(regions) == b"hello"
    assert holder not in holders()


async def test_a_process_that_is_killed_is_started_again_when_it_is_needed(regions, lent):
    await regions.register("r", lent.handle, GPU, 100)
    (holder,) = holders()
    holder.kill()
    while regions.status():
        await asyncio.sleep(0.01)
    with pytest.raises(NotFound, match="'r' is gone, because the process that held it ended: signal SIGKILL"):
        await read(regions)
    await regions.register("r", lent.handle, GPU, 100)
    assert await read(regions) == b"hello"


async def overrun(regions):
    """Ask for more than may wait, and end the process; returns how what waited ended."""
    waiting = [asyncio.ensure_future(read(regions)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="'r' cannot be read: 3 copies from and to GPUs are waiting"):
        await read(regions)
    forgetting = asyncio.ensure_future(regions.unregister("r"))  # is asked for all the same
    await asyncio.sleep(0)
    regions.copier.end()
    await forgetting
    return [type(one) for one in await asyncio.gather(*waiting, return_exceptions=True)]


async def test_what_waits_for_the_process_is_bounded(regions, driver_says, lent, monkeypatch):
    monkeypatch.setattr(headrace.cuda_memory.process, "MAX_ASKED", 3)
    await regions.register("r", lent.handle, GPU, 100)
    before = descriptors()
    driver_says.write_text("cuMemcpyDtoHAsync_v2=-1")
    assert await overrun(regions) == [NotReady] * 3
    await asyncio.sleep(0)  # what has woken this up holds the errors, and those what was to be read into
    gc.collect()
    assert descriptors() <= before


async def test_a_process_that_cannot_be_started_is_told(regions, lent, monkeypatch):
    def refuse(*_, **__):
        raise OSError(11, os.strerror(11))

    with monkeypatch.context() as patched:
        patched.setattr(headrace.cuda_memory.process, "spawn", refuse)
        with pytest.raises(Overloaded, match="region 'r': no process for the memory of GPUs can be started now"):
            await regions.register("r", lent.handle, GPU, 100)
    await regions.register("r", lent.handle, GPU, 100)


async def test_one_that_was_told_to_end_is_no_loss(driver_says, lent):
    lost = []
    copier = CopierProcess("text", lost.append)
    copier.end()
    await copier.close()
    await copier.ask(frames.Open(1, GPU, lent.handle, 100))
    assert not copier.busy
    first = holders()
    copier.end()
    await copier.ask(frames.Open(1, GPU, lent.handle, 100))  # another one, whether that has ended or not
    assert holders() != first
    await copier.close()
    assert lost == []
    assert holders() == []
