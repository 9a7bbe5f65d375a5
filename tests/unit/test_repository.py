"""What a repository serves as models come, change and go; served by made-up workers."""

import asyncio
import errno
import json
import os
import tempfile
import threading
from pathlib import Path

import pytest

from headrace.core.errors import Forbidden, InvalidRequest, NotFound, NotReady
from headrace.core.model import ModelInfo, Signature
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType
from headrace.repository import layout
from headrace.repository.declared import config_json, declared_signature
from headrace.repository.form import version_print
from headrace.repository.layout import read_folder
from headrace.repository.overrides import read_override
from headrace.repository.repository import IndexEntry, Repository
from headrace.workers.loads import LoadRefused

X = "{name: x, datatype: FP32, shape: [-1, 2]}"
Y = "{name: y, datatype: FP32, shape: [-1, 2]}"
PLAIN = f"backend: fake\nmax_batch_size: 4\ninputs: [{X}]\noutputs: [{Y}]\n"


class Worker:
    """A version whose file says whether it can be loaded; it keeps a request while ``busy`` is set."""

    def __init__(self, log, folder, files):
        self._log = log
        self.folder = folder
        self.files = files
        self.version = str(files.version)
        self.print = version_print(folder, files.version)
        self.statistics = Statistics()
        self.instances = []
        self.broken = False
        self.ready = False
        self.why_unready = "its worker is restarting"
        self.notes = ()
        self.idle = asyncio.Event()
        self.idle.set()

    async def start(self):
        self._log.append(f"load {self.folder.name} {self.version}")
        for _ in range(5):
            await asyncio.sleep(0)
        place = self.files.model_path / "says"
        said = place.read_text() if place.exists() else ""
        if said:
            raise LoadRefused(said)
        config = self.folder.config
        signature = Signature(
            tuple(one.spec() for one in config.inputs),
            tuple(one.spec() for one in config.outputs),
            config.max_batch_size or 0,
        )
        self.info = ModelInfo(self.folder.name, self.version, "fake", "fake", signature)
        self.ready = True

    async def drain(self):
        await self.idle.wait()
        self._log.append(f"end {self.folder.name} {self.version}")


class Models:
    """A folder of models and a repository over it; ``log`` has the loads and ends of versions in order."""

    def __init__(self, path, control):
        self.path = path
        self.log = []
        self.repository = Repository(path, None, control, lambda folder, files: Worker(self.log, folder, files))

    def plain(self, name, config=PLAIN, version=1, says=""):
        folder = self.path / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "says").write_text(says)
        (self.path / name / "config.yaml").write_text(config)

    def ensemble(self, name, *models, more=""):
        (self.path / name).mkdir(exist_ok=True)
        steps = "".join(
            f"- {{model: {model}, inputs: {{x: t{number}}}, outputs: {{y: t{number + 1}}}}}\n"
            for number, model in enumerate(models)
        )
        (self.path / name / "config.yaml").write_text(f"ensemble:\n{steps}{more}")

    def remove(self, name):
        for path in sorted((self.path / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (self.path / name).rmdir()

    async def quiet(self):
        """Wait until nothing goes on any more."""
        while self.repository._tasks:
            await asyncio.wait(self.repository._tasks)
            await asyncio.sleep(0)

    async def states(self):
        """What the index says, in short."""
        return {f"{one.name}{one.version and ' '}{one.version}": one.state for one in await self.repository.index()}

    def reason(self, name):
        """Why the index says that something of this model does not serve."""
        return "; ".join(one.reason for one in self.repository.entries(name))

    def serves(self, name, version=""):
        return self.repository.find(name, version) is not None


@pytest.fixture
async def explicit(tmp_path):
    models = Models(tmp_path, "explicit")
    yield models
    await models.repository.close()


@pytest.fixture
async def polled(tmp_path):
    models = Models(tmp_path, "poll")
    yield models
    await models.repository.close()


def config_of(**more):
    """A configuration as a load request brings it."""
    tensor = {"data_type": "TYPE_FP32", "dims": [2]}
    plain = {
        "backend": "fake",
        "max_batch_size": "16",
        "input": [{"name": "x", **tensor}],
        "output": [{"name": "y", **tensor}],
    }
    return json.dumps({**plain, **more})


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """Other tests' servers have such folders too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def private_folders():
    return set(Path(tempfile.gettempdir()).glob("headrace-load-*"))


# ---- ensembles: what they need is loaded first ----


async def test_the_event_loop_does_not_wait_while_the_disk_is_looked_at(explicit):
    explicit.plain("a")
    disk, released = explicit.repository._disk, threading.Event()
    names = disk.names
    disk.names = lambda: names() if released.wait(20) else ["waited for"]
    asked = asyncio.gather(explicit.repository.names(), explicit.repository.index())
    await asyncio.sleep(0)
    released.set()
    assert await asked == [["a"], [IndexEntry("a")]]
    assert explicit.repository.entries("b") == [IndexEntry("b")]


async def test_a_repository_behind_a_link_that_is_led_elsewhere(tmp_path):
    link = tmp_path / "current"
    link.symlink_to("1")
    models = Models(link, "poll")
    for release, name in ("1", "old"), ("2", "new"):
        models.path = tmp_path / release
        models.plain(name)
    await models.repository.load_all(["old"])
    link.unlink()
    link.symlink_to("2")
    for name in "old", "new":
        await models.repository.refresh(name)
    await models.quiet()
    assert await models.states() == {"new 1": "READY"}
    await models.repository.close()


async def test_loading_an_ensemble_loads_its_models_first(explicit):
    explicit.plain("a")
    explicit.plain("b")
    explicit.plain("other")
    explicit.ensemble("e", "a", "b")
    await explicit.repository.load("e")
    assert sorted(explicit.log) == ["load a 1", "load b 1"]
    served = explicit.repository.lookup("e", "")
    assert [spec.name for spec in served.info.signature.inputs] == ["t0"]
    assert [spec.name for spec in served.info.signature.outputs] == ["t2"]
    assert served.info.signature.max_batch_size == 4
    assert (served.info.platform, served.version, served.ready) == ("ensemble", "1", True)
    assert await explicit.states() == {"a 1": "READY", "b 1": "READY", "e 1": "READY", "other": ""}


async def test_ensembles_of_ensembles(explicit):
    explicit.plain("a")
    explicit.ensemble("inner", "a", "a")
    (explicit.path / "outer").mkdir()
    (explicit.path / "outer" / "config.yaml").write_text(
        "ensemble: [{model: inner, inputs: {t0: in}, outputs: {t2: out}}]"
    )
    await explicit.repository.load("outer")
    assert explicit.log == ["load a 1"]
    assert [spec.name for spec in explicit.repository.lookup("outer", "1").info.signature.outputs] == ["out"]
    await explicit.repository.unload("a")
    await explicit.quiet()
    assert await explicit.states() == {"a 1": "UNAVAILABLE", "inner 1": "UNAVAILABLE", "outer 1": "UNAVAILABLE"}
    assert explicit.reason("outer") == "its model 'inner' is not served: its model 'a' is not served: unloaded"


async def test_all_are_loaded_once_at_start(polled):
    for name in ("a", "b"):
        polled.plain(name)
    polled.plain("bad", says="out of memory")
    polled.ensemble("0 first in the list", "b", "a")
    polled.ensemble("cannot", "a", "bad")
    await polled.repository.load_all(["0 first in the list", "a", "b", "bad", "cannot"])
    assert sorted(polled.log) == ["load a 1", "load b 1", "load bad 1"]
    assert polled.serves("0 first in the list")
    assert polled.reason("cannot") == "its model 'bad' is not served: out of memory"
    assert polled.repository.unready() == ["bad", "cannot"]


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda models: None, "its model 'a' is not served: it is not loaded"),
        (lambda models: models.plain("a", says="bad file"), "its model 'a' is not served: bad file"),
        (
            lambda models: models.plain("a", "max_batch_size: x"),
            "its model 'a' is not served: config.yaml: max_batch_size: should be a valid integer, got 'x'",
        ),
        (
            lambda models: models.plain("a", PLAIN.replace("name: x", "name: z")),
            (
                "step 0 (model 'a') maps input 'x', which the model does not have; its inputs are ['z']; "
                "step 0 (model 'a') gets nothing for input 'z', which is not optional"
            ),
        ),
    ],
)
async def test_an_ensemble_that_cannot_be_served_says_why(explicit, prepare, reason):
    prepare(explicit)
    explicit.ensemble("e", "a")
    with pytest.raises(InvalidRequest) as caught:
        await explicit.repository.load("e")
    assert str(caught.value) == f"load failed for model 'e': version 1 is at UNAVAILABLE state: {reason};"
    assert explicit.reason("e") == reason
    with pytest.raises(NotReady, match="not at ready state"):
        explicit.repository.lookup("e", "1")


async def test_a_version_that_a_step_asks_for(explicit):
    explicit.plain("a", version=2)
    explicit.plain("e", "ensemble: [{model: a, version: 1, inputs: {x: x}, outputs: {y: y}}]")
    with pytest.raises(InvalidRequest, match=r"its model 'a' version 1 is not served: it has no such version; \['2'\]"):
        await explicit.repository.load("e")


@pytest.mark.parametrize("first", ["a", "b", "c"])
async def test_ensembles_in_a_circle_are_refused_with_the_chain(explicit, first):
    for name, used in (("a", "b"), ("b", "c"), ("c", "a")):
        explicit.ensemble(name, used)
    with pytest.raises(InvalidRequest) as caught:
        await asyncio.wait_for(explicit.repository.load(first), 30)
    chain = [first]
    while len(chain) < 4:
        chain.append({"a": "b", "b": "c", "c": "a"}[chain[-1]])
    assert f"ensembles are made of each other in a circle: {' -> '.join(chain)};" in str(caught.value)
    await asyncio.wait_for(explicit.quiet(), 30)


async def test_a_circle_loaded_at_once_does_not_lock_up(polled):
    for name, used in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "d")):
        polled.ensemble(name, used)
    await asyncio.wait_for(polled.repository.load_all(["a", "b", "c", "d"]), 30)
    await asyncio.wait_for(polled.quiet(), 30)
    for name in "abcd":
        assert polled.reason(name).startswith(f"ensembles are made of each other in a circle: {name} -> ")


# ---- ensembles: what happens to their models happens to them ----


async def test_an_ensemble_comes_and_goes_with_its_models(polled):
    polled.plain("a")
    polled.ensemble("e", "a", "b")
    await polled.repository.load_all(["a", "e"])
    polled.repository.settled = True
    assert polled.reason("e") == "its model 'b' is not served: it is not loaded"
    polled.plain("b")
    await polled.repository.refresh("b")
    await polled.quiet()
    assert polled.serves("e")
    assert polled.reason("e") == ""
    polled.remove("b")
    await polled.repository.refresh("b")
    await polled.quiet()
    assert not polled.serves("e")
    assert await polled.states() == {"a 1": "READY", "e 1": "UNAVAILABLE"}
    assert "its model 'b' is not served" in polled.reason("e")


async def test_an_ensemble_does_not_load_a_folder_that_may_still_be_copied(polled):
    await polled.repository.load_all([])
    polled.repository.settled = True
    polled.plain("a")
    polled.ensemble("e", "a")
    await polled.repository.refresh("e")
    assert polled.log == []
    await polled.repository.refresh("a")
    await polled.quiet()
    assert polled.serves("e")


async def test_an_ensemble_is_planned_again_when_a_model_has_another_signature(explicit):
    explicit.plain("a")
    explicit.ensemble("e", "a")
    await explicit.repository.load("e")
    before = explicit.repository.lookup("e", "")
    explicit.plain("a", PLAIN.replace("-1, 2", "-1, 5"), version=2)
    await explicit.repository.load("a")
    await explicit.quiet()
    after = explicit.repository.lookup("e", "")
    assert after is not before
    assert after.info.signature.inputs[0].shape == (-1, 5)
    explicit.plain("a", PLAIN.replace("name: y", "name: z"), version=3)
    await explicit.repository.load("a")
    await explicit.quiet()
    assert not explicit.serves("e")
    assert "maps output 'y', which the model does not have" in explicit.reason("e")


async def test_an_ensemble_stays_when_a_model_is_replaced_by_its_like(explicit):
    explicit.plain("a")
    explicit.ensemble("e", "a")
    await explicit.repository.load("e")
    before = explicit.repository.lookup("e", "")
    explicit.plain("a", version=2)
    await explicit.repository.load("a")
    await explicit.quiet()
    assert explicit.repository.lookup("a", "").version == "2"
    assert explicit.repository.lookup("e", "") is before


async def test_a_bad_edit_of_an_ensemble_leaves_what_serves(explicit):
    explicit.plain("a")
    explicit.ensemble("e", "a")
    await explicit.repository.load("e")
    before = explicit.repository.lookup("e", "")
    explicit.ensemble("e", "a", "gone")
    with pytest.raises(InvalidRequest, match="could not be loaded anew: its model 'gone' is not served"):
        await explicit.repository.load("e")
    assert explicit.repository.lookup("e", "") is before
    await explicit.repository.unload("a")  # now the old plan cannot hold either
    await explicit.quiet()
    assert not explicit.serves("e")


async def test_what_still_serves_counts_beside_what_is_wanted(explicit):
    explicit.plain("a")
    explicit.plain("b")
    explicit.ensemble("e", "a")
    await explicit.repository.load("e")
    explicit.ensemble("e", "b", "gone")
    with pytest.raises(InvalidRequest, match="its model 'gone' is not served"):
        await explicit.repository.load("e")
    explicit.plain("a", "ensemble: [{model: e, inputs: {t0: x}, outputs: {t1: y}}]", version=2)
    with pytest.raises(InvalidRequest, match="in a circle: a -> e -> a"):
        await explicit.repository.load("a")
    await explicit.quiet()
    assert explicit.repository.is_ready("e", "")
    await explicit.repository.unload("a")
    await explicit.quiet()
    assert not explicit.serves("e")


async def test_a_model_that_is_not_ready_makes_its_ensemble_unready(explicit):
    explicit.plain("a")
    explicit.ensemble("e", "a")
    await explicit.repository.load("e")
    explicit.repository.lookup("a", "").ready = False
    assert not explicit.repository.is_ready("e", "")
    assert explicit.reason("e") == "of its models these are not ready: a"
    assert explicit.repository.unready() == ["a", "e"]


# ---- ensembles: unloading ----


async def test_unload_dependents_takes_what_was_loaded_only_for_the_ensemble(explicit):
    for name in ("a", "b", "c"):
        explicit.plain(name)
    explicit.ensemble("inner", "a")
    explicit.plain(
        "e",
        "ensemble:\n- {model: inner, inputs: {t0: t}, outputs: {t1: u}}\n"
        "- {model: b, inputs: {x: u}, outputs: {y: v}}\n- {model: c, inputs: {x: v}, outputs: {y: w}}\n",
    )
    explicit.ensemble("shares", "c")
    await explicit.repository.load("b")
    await explicit.repository.load("e")
    await explicit.repository.load("shares")
    await explicit.repository.unload("e", dependents=True)
    assert [name for name in ("a", "b", "c", "inner", "e", "shares") if explicit.serves(name)] == ["b", "c", "shares"]
    assert explicit.log[-1] == "end a 1"


async def test_what_was_unloaded_is_not_asked_for_any_more(explicit):
    explicit.plain("a")
    explicit.ensemble("e", "a")
    await explicit.repository.load("a")
    await explicit.repository.unload("a")
    await explicit.repository.load("e")
    await explicit.repository.unload("e", dependents=True)
    assert not explicit.serves("a")


async def test_a_plain_unload_leaves_the_models(explicit):
    explicit.plain("a")
    explicit.ensemble("e", "a")
    await explicit.repository.load("e")
    await explicit.repository.unload("e")
    await explicit.quiet()
    assert explicit.serves("a")
    assert await explicit.states() == {"a 1": "READY", "e 1": "UNAVAILABLE"}
    assert explicit.reason("e") == "unloaded"
    await explicit.repository.unload("a")
    await explicit.repository.load("a")
    await explicit.quiet()
    assert not explicit.serves("e"), "nobody asked for it"


async def test_models_serve_until_their_ensemble_has_answered(explicit):
    explicit.plain("a")
    explicit.ensemble("e", "a")
    await explicit.repository.load("e")
    served = explicit.repository.lookup("e", "")
    served.running += 1
    unloading = asyncio.create_task(explicit.repository.unload("e", dependents=True))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not explicit.serves("e")
    assert explicit.serves("a")
    served.running -= 1
    served.notice_idle()
    await unloading
    assert not explicit.serves("a")


async def test_closing_ends_ensembles_before_their_models(explicit):
    explicit.plain("a")
    explicit.ensemble("inner", "a")
    explicit.plain("outer", "ensemble: [{model: inner, inputs: {t0: t}, outputs: {t1: u}}]")
    await explicit.repository.load("outer")
    outer = explicit.repository.lookup("outer", "")
    outer.running += 1
    closing = asyncio.create_task(explicit.repository.close())
    for _ in range(20):
        await asyncio.sleep(0)
    assert explicit.serves("inner")
    assert explicit.serves("a")
    outer.running -= 1
    outer.notice_idle()
    await asyncio.wait_for(closing, 30)
    assert explicit.log == ["load a 1", "end a 1"]


# ---- what the log says of a load that fails ----


async def test_the_log_tells_a_version_that_does_not_serve_from_one_that_serves_as_before(polled, caplog):
    polled.plain("m", says="out of memory")
    await polled.repository.refresh("m")
    assert [one.getMessage() for one in caplog.records] == ["model m version 1 is not served: out of memory"]
    polled.plain("m")
    await polled.repository.refresh("m")
    caplog.clear()
    polled.plain("m", config=f"{PLAIN}parameters: {{changed: 1}}\n", says="out of memory")
    await polled.repository.refresh("m")
    told = "model m version 1 could not be loaded anew and goes on as it was: out of memory"
    assert [one.getMessage() for one in caplog.records] == [told]
    assert polled.serves("m", "1")


# ---- a disk that fails ----


async def test_a_version_that_cannot_be_read_for_a_while_goes_on(explicit, monkeypatch):
    """As on a network file system that does not answer: what serves is in memory, and need not go."""
    explicit.plain("m")
    await explicit.repository.load("m")

    def unreadable(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(layout, "read_version", unreadable)
        with pytest.raises(InvalidRequest, match="version 1 could not be loaded anew: cannot be read: Input/output"):
            await explicit.repository.load("m")
        assert explicit.serves("m", "1")
        assert await explicit.states() == {"m 1": "READY"}
        explicit.plain("m", version=2)
        with pytest.raises(InvalidRequest):
            await explicit.repository.load("m")
        assert explicit.serves("m", "1")
    await explicit.repository.load("m")
    await explicit.quiet()
    assert (await explicit.states())["m 2"] == "READY"
    assert not explicit.serves("m", "1")
    assert "cannot be read" not in explicit.reason("m")


async def test_a_version_whose_folder_is_gone_is_not_kept(explicit, monkeypatch):
    explicit.plain("m")
    explicit.plain("m", version=2)
    await explicit.repository.load("m")

    def gone(*_):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(layout, "read_version", gone)
    with pytest.raises(InvalidRequest):
        await explicit.repository.load("m")
    await explicit.quiet()
    assert not explicit.serves("m")


async def test_a_model_that_is_removed_and_put_back_does_not_wait_for_what_it_answers_still(polled):
    polled.plain("m")
    await polled.repository.refresh("m")
    old = polled.repository.lookup("m", "")
    old.idle.clear()  # as with a stream that goes on for minutes
    polled.remove("m")
    await asyncio.wait_for(polled.repository.refresh("m"), 30)
    assert not polled.serves("m")
    assert await polled.states() == {"m 1": "UNLOADING"}
    polled.plain("m")
    await asyncio.wait_for(polled.repository.refresh("m"), 30)
    assert polled.serves("m")
    assert await polled.states() == {"m 1": "READY"}
    old.idle.set()
    await polled.repository._shelf.wait_retired()
    await polled.quiet()
    assert await polled.states() == {"m 1": "READY"}
    polled.remove("m")
    await polled.repository.refresh("m")
    await polled.repository._shelf.wait_retired()
    assert await polled.states() == {}


# ---- load overrides ----


async def test_a_configuration_of_the_load_request(explicit):
    explicit.plain("a")
    await explicit.repository.load("a", config_of())
    assert explicit.repository.lookup("a", "").info.signature.max_batch_size == 16
    await explicit.repository.load("a")
    assert explicit.repository.lookup("a", "").info.signature.max_batch_size == 4
    assert explicit.log == ["load a 1", "load a 1", "end a 1"]


async def test_an_override_ends_with_an_unload(explicit):
    explicit.plain("a")
    await explicit.repository.load("a", config_of())
    await explicit.repository.unload("a")
    await explicit.repository.load("a")
    assert explicit.repository.lookup("a", "").info.signature.max_batch_size == 4


@pytest.mark.parametrize("on_disk", [True, False])
async def test_files_of_the_load_request(explicit, on_disk):
    if on_disk:
        explicit.plain("a", version=7)
    before = private_folders()
    files = {"3/says": b"", "3/deep/er/weights": b"123"}
    await explicit.repository.load("a", config_of(), files)
    assert explicit.repository.versions("a") == ["3"]
    served = explicit.repository.lookup("a", "3")
    assert (served.files.model_path / "deep" / "er" / "weights").read_bytes() == b"123"
    (private,) = private_folders() - before
    assert private.stat().st_mode & 0o77 == 0
    assert await explicit.states() == {"a 3": "READY"}
    assert "a" in await explicit.repository.names()
    await explicit.repository.unload("a")
    await explicit.quiet()
    assert private_folders() == before
    assert await explicit.states() == {"a 3": "UNAVAILABLE"}
    if on_disk:
        await explicit.repository.load("a")
        assert explicit.repository.versions("a") == ["7"]
    else:
        with pytest.raises(NotFound, match="failed to load 'a'"):
            await explicit.repository.load("a")


async def test_files_stay_while_what_was_made_of_them_answers(explicit):
    before = private_folders()
    await explicit.repository.load("a", config_of(), {"1/says": b""})
    first = private_folders() - before
    served = explicit.repository.lookup("a", "")
    served.idle.clear()
    await explicit.repository.load("a", config_of(max_batch_size=2), {"1/says": b"", "2/says": b""})
    await asyncio.sleep(0)
    assert explicit.repository.lookup("a", "").info.signature.max_batch_size == 2
    assert first < private_folders()
    served.idle.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await explicit.quiet()
    assert len(private_folders() - before) == 1
    assert not first & private_folders()
    await explicit.repository.close()
    assert private_folders() == before


async def test_loads_with_files_at_once(explicit):
    before = private_folders()
    loads = [explicit.repository.load("a", config_of(), {f"{version}/says": b""}) for version in (1, 2, 3, 4)]
    await asyncio.gather(*loads)
    await explicit.quiet()
    (version,) = explicit.repository.versions("a")
    assert explicit.repository.lookup("a", version).files.model_path.is_dir()
    assert len(private_folders() - before) == 1


@pytest.mark.parametrize(
    ("config", "files", "found"),
    [
        (config_of(), {"1/says": b"no memory"}, "version 1 could not be loaded anew: no memory;"),
        (config_of(), {"4/says": b"no memory"}, "version 4 is at UNAVAILABLE state: no memory;"),
        (
            config_of(version_policy={"all": {}}),
            {"1/says": b"", "2/says": b"bad"},
            "version 2 is at UNAVAILABLE state: ",
        ),
        (config_of(backend="torch"), {}, "version 1 could not be loaded anew: has no model file for backend 'torch'"),
        (
            config_of(version_policy={"specific": {"versions": [1, 9]}}),
            {},
            "version 9 is at UNAVAILABLE state: is want",
        ),
        (
            config_of(output=[{"name": "y", "data_type": "TYPE_FP32", "dims": [2], "label_filename": "no"}]),
            {},
            "no: ca",
        ),
    ],
)
async def test_a_bad_override_fails_and_what_served_goes_on(explicit, config, files, found):
    explicit.plain("a")
    await explicit.repository.load("a", config_of(), {"1/says": b""})
    served = explicit.repository.lookup("a", "")
    before, states = private_folders(), await explicit.states()
    with pytest.raises(InvalidRequest) as caught:
        await explicit.repository.load("a", config, files)
    assert found in str(caught.value)
    await explicit.quiet()
    assert explicit.repository.lookup("a", "") is served
    assert explicit.repository.versions("a") == ["1"]
    assert await explicit.states() == states
    assert explicit.reason("a") == ""
    assert explicit.repository.unready() == []
    assert private_folders() == before
    assert served.files.model_path.exists()


async def test_a_bad_override_while_the_version_before_it_ends(explicit):
    explicit.plain("a")
    await explicit.repository.load("a")
    served = explicit.repository.lookup("a", "")
    served.idle.clear()
    await explicit.repository.unload("a")
    assert await explicit.states() == {"a 1": "UNLOADING"}

    class Noticing(list):
        def append(self, line):
            super().append(line)
            served.idle.set()  # it ends while the new one is tried

    explicit.log = Noticing()
    with pytest.raises(InvalidRequest, match="no memory"):
        await explicit.repository.load("a", config_of(), {"1/says": b"no memory"})
    await explicit.quiet()
    assert await explicit.states() == {"a 1": "UNAVAILABLE"}


async def test_a_bad_first_override_leaves_nothing(explicit):
    before = private_folders()
    with pytest.raises(InvalidRequest, match="no memory"):
        await explicit.repository.load("a", config_of(), {"1/says": b"no memory"})
    await explicit.quiet()
    assert await explicit.states() == {}
    assert await explicit.repository.names() == []
    assert not explicit.repository.has("a")
    assert private_folders() == before


async def test_an_ensemble_by_override(explicit):
    explicit.plain("a")
    steps = [{"model_name": "a", "model_version": "-1", "input_map": {"x": "in"}, "output_map": {"y": "out"}}]
    config = json.dumps({"platform": "ensemble", "ensemble_scheduling": {"step": steps}})
    await explicit.repository.load("e", config, {"1/nothing": b""})
    assert explicit.repository.lookup("e", "").ready
    await explicit.repository.unload("a")
    await explicit.repository.load("a")
    await explicit.quiet()
    assert explicit.serves("e"), "an override holds when it is planned again"


@pytest.mark.parametrize(
    ("config", "files", "found"),
    [
        ("", {"1/model.onnx": b""}, "files are given without the parameter config, which they need"),
        ("{", {}, "config: is no model configuration in JSON"),
        ('{"max_bach_size": 1}', {}, "config: is no model configuration in JSON"),
        ('{"name": "b"}', {}, "config: name: is 'b', expected the folder's name, 'a', or none"),
        ('{"max_batch_size": "-1"}', {}, "config: max_batch_size: should be greater than or equal to 0, got -1"),
        (
            "{}",
            {"model.onnx": b""},
            "Invalid file path 'model.onnx': has no version in front, expected a version and a path in it",
        ),
        ("{}", {"0/model.onnx": b""}, "Invalid file path '0/model.onnx': has no version in front"),
        ("{}", {"01/x": b""}, "Invalid file path '01/x': has no version in front"),
        ("{}", {"1": b""}, "Invalid file path '1': has no version in front"),
        ("{}", {"1/": b""}, "Invalid file path '1/': is not a plain path"),
        ("{}", {"/1/x": b""}, "Invalid file path '/1/x': has no version in front"),
        ("{}", {"../1/x": b""}, "Invalid file path '../1/x': has no version in front"),
        ("{}", {"1/../../x": b""}, "Invalid file path '1/../../x': is not a plain path"),
        ("{}", {"1/./x": b""}, "Invalid file path '1/./x': is not a plain path"),
        ("{}", {"1//x": b""}, "Invalid file path '1//x': is not a plain path"),
        ("{}", {"1/x\0": b""}, "is no name of a file"),
        ("{}", {"1/\ud800": b""}, "is no name of a file"),
        ("{}", {f"1/{'x' * 256}": b""}, "is too long"),
        ("{}", {f"1/{'x/' * 600}x": b""}, "is too long"),
        ("{}", {"1/a": b"", "1/a/b": b""}, "file '1/a/b': '1/a' is a file too, and cannot be its folder"),
    ],
)
async def test_overrides_that_are_refused_at_once(explicit, config, files, found):
    explicit.plain("a")
    with pytest.raises(InvalidRequest) as caught:
        await explicit.repository.load("a", config, files)
    assert str(caught.value).startswith("failed to load 'a': ")
    assert found in str(caught.value)
    assert explicit.log == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "x.tmp", "n\0", "n" * 256, "\ud800"])
async def test_names_that_no_override_can_have(explicit, name):
    with pytest.raises(InvalidRequest, match="cannot be the name of a model"):
        await explicit.repository.load(name, "{}", {"1/model.onnx": b""})


async def test_every_problem_of_an_override_is_told():
    with pytest.raises(InvalidRequest) as caught:
        read_override("..", '{"max_batch_size": -1}', {"x": b"", "y": b""})
    assert str(caught.value).count(";") == 3


async def test_a_configuration_for_a_model_that_is_not_there(explicit):
    with pytest.raises(NotFound, match="failed to load 'a', failed to poll from model repository: no such model"):
        await explicit.repository.load("a", config_of())


@pytest.mark.parametrize("control", ["poll", "none"])
async def test_overrides_need_explicit_control(tmp_path, control):
    models = Models(tmp_path, control)
    with pytest.raises(Forbidden, match="explicit model load / unload is not allowed"):
        await models.repository.load("a", "{}", {"1/x": b""})
    assert await models.repository.index() == []


# ---- what workers are told ----

STATEFUL = f"""
backend: fake
max_batch_size: 4
inputs: [{X}]
outputs: [{Y}]
decoupled: true
sequence:
  controls: [{{input: START, kind: start, datatype: INT32}}, {{input: x, kind: end, datatype: FP32}}]
  states: [{{input: s, output: t, datatype: INT8, shape: [3]}}]
"""


def folder_of(tmp_path, config):
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "config.yaml").write_text(config)
    return read_folder(tmp_path / "m")


def test_declared_tensors_have_the_hidden_ones_with_them(tmp_path):
    declared = declared_signature(folder_of(tmp_path, STATEFUL))
    assert [(one.name, one.datatype, one.shape) for one in declared.inputs] == [
        ("x", DataType.FP32, (-1, 2)),
        ("START", DataType.INT32, None),
        ("s", DataType.INT8, (-1, 3)),
    ]
    assert [(one.name, one.shape) for one in declared.outputs] == [("y", (-1, 2)), ("t", (-1, 3))]
    assert (declared.max_batch_size, declared.decoupled) == (4, True)


def test_where_nothing_is_declared_nothing_is_added(tmp_path):
    config = STATEFUL.replace(f"inputs: [{X}]", "").replace(f"outputs: [{Y}]", "")
    declared = declared_signature(folder_of(tmp_path, config))
    assert (declared.inputs, declared.outputs) == ((), ())


def test_the_configuration_that_python_models_are_given(tmp_path):
    told = json.loads(config_json(folder_of(tmp_path, STATEFUL), 1))
    assert told["name"] == "m"
    assert told["max_batch_size"] == 4
    assert told["input"][0]["dims"] == [2]
    assert [one["name"] for one in told["output"]] == ["y"]
    assert told["model_transaction_policy"] == {"decoupled": True}
    assert told["sequence_batching"]["control_input"][0]["name"] == "START"
