"""How changes of a repository are followed where the system does not tell of them."""

import asyncio
from types import SimpleNamespace

import pytest
from watchfiles import awatch

from headrace.repository import layout, watcher
from headrace.repository.watcher import Watcher, take_prints


class Repository:
    """Notes which models are to be looked at anew."""

    def __init__(self, path):
        self.path = path
        self.refreshed = asyncio.Queue()
        self.found = {}  # the model files that were there
        self.while_loading = lambda name: None

    async def refresh(self, name):
        self.refreshed.put_nowait(name)
        self.while_loading(name)
        self.found[name] = sorted(path.name for path in (self.path / name).rglob("model.*"))


def model(repository, name, content=b"1"):
    folder = repository / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(content)


@pytest.fixture
async def followed(tmp_path, monkeypatch):
    """A repository of one model that is followed, quickly."""
    monkeypatch.setattr(watcher, "SETTLE_S", 0.01)
    monkeypatch.setattr(watcher, "RESCAN_S", 0.01)
    monkeypatch.setattr(watcher, "AGAIN_S", 0.01)
    model(tmp_path, "first")
    repository = Repository(tmp_path)
    follower = Watcher(repository)
    running = []

    def follow(path=tmp_path):
        repository.path = path
        running.append(asyncio.get_running_loop().create_task(follower.run(take_prints(path))))

    yield SimpleNamespace(
        follow=follow,
        path=tmp_path,
        next=lambda: asyncio.wait_for(repository.refreshed.get(), 20),
        found=repository.found,
        repository=repository,
    )
    follower.stop()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize(
    "error", [OSError("OS file watch limit reached."), RuntimeError("Error creating recommended watcher")]
)
async def test_where_nothing_can_be_watched_changes_are_looked_for(followed, monkeypatch, caplog, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(watcher, "awatch", refuse)
    followed.follow()
    for turn in range(3):
        model(followed.path, "second", b"%d" % turn)
        assert await followed.next() == "second"
    assert caplog.text.count(str(error)) == 1, "once, not at every try"


async def test_what_may_not_be_read_is_passed_over(followed, monkeypatch):
    """For instance the lost+found of a volume, in a server that does not run as root."""
    given = {}

    def watch(*paths, **settings):
        given.update(settings)
        return awatch(*paths, **settings)

    monkeypatch.setattr(watcher, "awatch", watch)
    monkeypatch.setattr(watcher, "RESCAN_S", 1)
    followed.follow()
    model(followed.path, "second")
    assert await followed.next() == "second"
    assert given["ignore_permission_denied"] is True


async def test_a_repository_behind_a_link_that_is_led_elsewhere(followed, monkeypatch, tmp_path):
    """As tools do that bring a whole repository at once: what they have replaced is not followed any more."""
    watched = asyncio.Queue()

    def watch(root, **settings):
        watched.put_nowait(root.resolve())
        return awatch(root, **settings)

    monkeypatch.setattr(watcher, "awatch", watch)
    monkeypatch.setattr(watcher, "RESCAN_S", 1)
    for release in "12":
        model(tmp_path / release, "first")
    link = tmp_path / "current"
    link.symlink_to("1")
    followed.follow(link)
    assert await asyncio.wait_for(watched.get(), 20) == tmp_path / "1"
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").replace(link)
    assert await followed.next() == "first"
    assert await asyncio.wait_for(watched.get(), 20) == tmp_path / "2"


async def test_a_model_file_that_is_still_to_come_is_waited_for(followed, monkeypatch):
    """As with rsync, which writes to a hidden file and renames it at the end."""
    monkeypatch.setattr(watcher, "RESCAN_S", 1)
    monkeypatch.setattr(watcher, "ARRIVAL_S", 60)
    looked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read_folder(path):
        folder = layout.read_folder(path)
        loop.call_soon_threadsafe(looked.set)
        return folder

    monkeypatch.setattr(watcher, "read_folder", read_folder)
    followed.follow()
    folder = followed.path / "second" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.yaml").write_text("max_batch_size: 4")
    part = folder / ".model.onnx.Kx3a9Q"
    part.write_bytes(b"1")
    await asyncio.wait_for(looked.wait(), 20)
    looked.clear()
    async with asyncio.timeout(20):
        while not looked.is_set():  # then it is waited for another 60 seconds
            part.write_bytes(part.read_bytes() + b"1")
            await asyncio.sleep(0.01)
    part.rename(folder / "model.onnx")
    assert await followed.next() == "second"
    assert followed.found["second"] == ["model.onnx"]


async def test_a_model_file_that_does_not_come_is_not_waited_for_for_ever(followed, monkeypatch):
    monkeypatch.setattr(watcher, "RESCAN_S", 1)
    monkeypatch.setattr(watcher, "ARRIVAL_S", 0.02)
    followed.follow()
    (followed.path / "second" / "1").mkdir(parents=True)
    while followed.found.get("second") is None:
        assert await followed.next() == "second"
    assert followed.found["second"] == []


async def test_hidden_folders_are_not_followed(followed, monkeypatch):
    """A large model that is copied under a hidden name need not be walked through again and again."""
    monkeypatch.setattr(watcher, "RESCAN_S", 1)
    followed.follow()
    for name in "second", "third", "fourth":  # the first may be found without being told, and so without the hidden one
        model(followed.path, ".copying", name.encode())
        model(followed.path, name)
        while await followed.next() != name:
            pass
    assert ".copying" not in followed.found


@pytest.fixture
def writing(followed, monkeypatch):
    """Followed as well, with models that write to their own folder whenever they are loaded."""

    def write(name):
        cache = followed.path / name / "1" / "engine.cache"
        cache.write_bytes(cache.read_bytes() + b"1" if cache.exists() else b"")

    followed.repository.while_loading = write
    monkeypatch.setattr(watcher, "RESCAN_S", 1)
    monkeypatch.setattr(watcher, "LOOK_S", 0.01)
    return followed


async def test_a_model_that_writes_to_its_own_folder_is_not_loaded_for_ever(writing, monkeypatch, caplog):
    monkeypatch.setattr(watcher, "FIRST_REST_S", 60)
    model(writing.path, "first", b"new")
    writing.follow()
    model(writing.path, "first", b"newer")
    for _ in range(watcher.CALM_LOADS):
        assert await writing.next() == "first"
    async with asyncio.timeout(20):
        while "engine.cache" not in caplog.text:
            await asyncio.sleep(0.01)
    assert "model first: 1/engine.cache changed again while it was loaded" in caplog.text
    assert writing.repository.refreshed.empty()
    model(writing.path, "first", b"newest")  # which nobody but its owner does
    assert await writing.next() == "first"


async def test_what_changes_right_behind_each_load_is_followed_more_and_more_rarely(writing, monkeypatch, caplog):
    monkeypatch.setattr(watcher, "FIRST_REST_S", 0.02)
    writing.follow()
    model(writing.path, "second")
    for _ in range(watcher.CALM_LOADS + 2):
        assert await writing.next() == "second"
    assert caplog.text.count("engine.cache") == 1
