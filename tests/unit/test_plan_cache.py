"""The folder of plans: found where they hold, refused with a reason where anything is not as it was put there."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from headrace_backends.optimize import plan_cache
from headrace_backends.optimize.accuracy import Errors
from headrace_backends.optimize.basis import difference, model_digest, present_basis, versions
from headrace_backends.optimize.form import Form, Step
from headrace_backends.optimize.hardware import hardware
from headrace_backends.optimize.plan import PLAN_FILE, REPLAY_FILE, BadPlan, Basis, Plan, write_plan
from headrace_backends.optimize.plan_cache import (
    MAX_PLANS,
    MAX_REFUSED,
    BrokenPlan,
    NoPlan,
    PlanCache,
    RefusedPlan,
    StalePlan,
    default_plan_cache,
)
from headrace_backends.optimize.replay import write_replay

DIGEST = "d1"


def plan_of(model: str = "m", version: str = "1", digest: str = DIGEST, artifact: str = "model.onnx") -> Plan:
    return Plan(
        model=model,
        version=version,
        basis=Basis(digest, hardware(), versions("onnxruntime")),
        form=Form("onnxruntime", (Step("simplify"),)),
        artifact=artifact,
        files={},
        budget=None,
        allow=(),
        objective="latency",
        examples="8 made up",
        errors=Errors(4, 0.0, 0.0),
        speedup=2.0,
        curve=(),
        reference_curve=(),
        made_at="2026-01-01T00:00:00Z",
    )


def filled(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_text(text)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "model.bin").write_bytes(b"\0\1")
    x = {"x": np.zeros((1, 2), np.float32)}
    write_replay(folder / REPLAY_FILE, [x], [x])
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


@pytest.fixture
def folder(cache: PlanCache, tmp_path: Path) -> Path:
    return cache.put(filled(tmp_path / "made"), plan_of())[1]


def test_what_was_put_is_found(cache: PlanCache, folder: Path) -> None:
    plan, where = cache.find("m", "1", DIGEST)
    assert where == folder == cache.folder("m", "1", plan.basis)
    assert (where / plan.artifact).read_text() == "weights"
    assert plan.files.keys() == {"model.onnx", "data/model.bin", REPLAY_FILE}


def test_none_was_made(cache: PlanCache, folder: Path) -> None:
    for model, version in (("other", "1"), ("m", "2")):
        with pytest.raises(NoPlan, match="none was made"):
            cache.find(model, version, DIGEST)


def _truncate(folder: Path) -> None:
    (folder / "model.onnx").write_text("weight")


def _change(folder: Path) -> None:
    (folder / "data" / "model.bin").write_bytes(b"\0\2")


def _lose(folder: Path) -> None:
    (folder / REPLAY_FILE).unlink()


def _add(folder: Path) -> None:
    (folder / "data" / "more.bin").write_bytes(b"")


def _break(folder: Path) -> None:
    (folder / PLAN_FILE).write_text("{")


def _lose_plan(folder: Path) -> None:
    (folder / PLAN_FILE).unlink()


def _other_format(folder: Path) -> None:
    write_plan(
        folder, msgspec.structs.replace(msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=Plan), format=9)
    )


def _escape(folder: Path) -> None:
    plan = msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=Plan)
    write_plan(folder, msgspec.structs.replace(plan, artifact="../../../etc/passwd"))


def _of_another(folder: Path) -> None:
    plan = msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=Plan)
    write_plan(folder, msgspec.structs.replace(plan, model="other"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncate, "'model.onnx' is not what was put there"),
        (_change, "'data/model.bin' is not what was put there"),
        (_lose, "'replay.npz' is missing"),
        (_add, "'data/more.bin' does not belong to it"),
        (_break, "plan.json cannot be read"),
        (_lose_plan, "plan.json cannot be read"),
        (_other_format, "plan.json is of format 9"),
        (_escape, "has no hash of '../../../etc/passwd'"),
        (_of_another, "it is not of this model"),
    ],
)
def test_a_spoilt_plan_is_refused_with_the_reason(
    cache: PlanCache, folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(folder)
    with pytest.raises(BrokenPlan) as refused:
        cache.find("m", "1", DIGEST)
    assert reason in str(refused.value)
    assert refused.value.folder == folder


def test_a_report_may_come_and_go(cache: PlanCache, folder: Path) -> None:
    (folder / "report.html").write_text("<html>")
    assert cache.find("m", "1", DIGEST)[1] == folder


def test_a_plan_copied_to_another_model_is_foreign(cache: PlanCache, folder: Path) -> None:
    elsewhere = cache.place("other", "1")
    elsewhere.mkdir(parents=True)
    folder.rename(elsewhere / folder.name)
    with pytest.raises(BrokenPlan, match="not of this model"):
        cache.find("other", "1", DIGEST)


def test_a_plan_for_another_model_machine_or_library_is_stale(cache: PlanCache, tmp_path: Path) -> None:
    made = filled(tmp_path / "made")
    plan = plan_of()
    with pytest.raises(NoPlan):
        cache.find("m", "1", DIGEST)
    cache.put(made, plan)
    with pytest.raises(StalePlan, match="files or its configuration have changed"):
        cache.find("m", "1", "d2")
    other = msgspec.structs.replace(plan.basis, versions={"onnxruntime": "0.1"})
    cache.put(made, msgspec.structs.replace(plan, version="2", basis=other))
    with pytest.raises(StalePlan, match=r"onnxruntime was 0\.1 and is "):
        cache.find("m", "2", DIGEST)


def test_a_good_plan_is_found_among_stale_and_broken_ones(cache: PlanCache, tmp_path: Path) -> None:
    made = filled(tmp_path / "made")
    _, good = cache.put(made, plan_of())
    cache.put(made, plan_of(digest="old"))
    _, broken = cache.put(made, plan_of(digest="older"))
    (broken / PLAN_FILE).write_text("")
    assert cache.find("m", "1", DIGEST)[1] == good


def test_a_new_plan_takes_the_place_of_the_old_one(cache: PlanCache, folder: Path, tmp_path: Path) -> None:
    cache.put(filled(tmp_path / "again", "better"), plan_of())
    _, where = cache.find("m", "1", DIGEST)
    assert where == folder
    assert (where / "model.onnx").read_text() == "better"
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]  # nothing is left behind


def test_a_refused_plan_is_kept_aside_and_never_found_again(cache: PlanCache, folder: Path, tmp_path: Path) -> None:
    cache.refuse(folder, "it was wrong")
    with pytest.raises(RefusedPlan, match="it was wrong"):
        cache.find("m", "1", DIGEST)
    (aside,) = folder.parent.iterdir()
    assert (aside / "model.onnx").exists()
    cache.put(filled(tmp_path / "again"), plan_of())  # rebuilt
    assert cache.find("m", "1", DIGEST)[1] == folder
    assert list(folder.parent.iterdir()) == [folder]


def test_a_plan_that_is_replaced_while_it_is_read_is_not_taken_for_broken(
    cache: PlanCache, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = plan_cache.read_plan

    def read_slowly(place: Path) -> Plan:
        found = read(place)
        monkeypatch.setattr(plan_cache, "read_plan", read)
        cache.put(filled(tmp_path / "again", "better"), plan_of())
        return found

    monkeypatch.setattr(plan_cache, "read_plan", read_slowly)
    _, where = cache.find("m", "1", DIGEST)
    assert (where / "model.onnx").read_text() == "better"


def test_only_the_plan_that_is_meant_is_refused(cache: PlanCache, folder: Path, tmp_path: Path) -> None:
    old, _ = cache.find("m", "1", DIGEST)
    new, _ = cache.put(filled(tmp_path / "again", "better"), plan_of())
    cache.refuse(folder, "it was wrong", old)
    assert cache.find("m", "1", DIGEST)[0] == new
    cache.refuse(folder, "it was wrong", new)
    with pytest.raises(RefusedPlan):
        cache.find("m", "1", DIGEST)


def test_refusing_what_is_gone_does_nothing(cache: PlanCache, folder: Path) -> None:
    cache.remove(folder)
    cache.refuse(folder, "too late")
    assert list(folder.parent.iterdir()) == []
    cache.remove(folder.parent)
    cache.refuse(folder, "too late")


def test_refused_and_old_plans_are_bounded(cache: PlanCache, tmp_path: Path) -> None:
    made = filled(tmp_path / "made")
    for number in range(MAX_PLANS + 3):
        cache.put(made, plan_of(digest=str(number)))
    place = cache.place("m", "1")
    assert len(list(place.iterdir())) == MAX_PLANS
    for one in list(place.iterdir()):
        cache.refuse(one, "no")
    assert len(list(place.iterdir())) == MAX_REFUSED


def test_a_plan_without_its_files_is_not_put(cache: PlanCache, tmp_path: Path) -> None:
    made = filled(tmp_path / "made")
    (made / "model.onnx").unlink()
    with pytest.raises(BadPlan, match=r"'model\.onnx' is missing"):
        cache.put(made, plan_of())
    plan, _ = cache.put(made, plan_of(artifact=""))  # of the file that was dropped in
    assert cache.find("m", "1", DIGEST)[0] == plan


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "refused-x", "ü" * 100, "x" * 255, "100%", "a b"])
def test_every_name_has_a_safe_folder_of_its_own(cache: PlanCache, name: str) -> None:
    place = cache.place(name, "1")
    assert place.parent.parent == cache.root
    assert place.parent != cache.place("%" + name, "1").parent
    assert len(place.parent.name.encode()) < 200
    assert not place.parent.name.startswith((".", "refused-"))


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_plan_cache() == tmp_path / "headrace" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_plan_cache() == tmp_path / "home" / ".cache" / "headrace" / "plans"


# ---- what plans depend on ----


def test_the_digest_follows_contents_and_configuration(tmp_path: Path) -> None:
    version = tmp_path / "1"
    (version / "sub").mkdir(parents=True)
    (version / "model.onnx").write_text("a")
    (version / "sub" / "b.bin").write_text("b")
    first = model_digest(version, {"max_batch_size": 4})
    (version / ".hidden").write_text("x")
    (version / "__pycache__").mkdir()
    (version / "sub" / "loop").symlink_to(version)
    assert model_digest(version, {"max_batch_size": 4}) == first
    assert model_digest(version, {"max_batch_size": 8}) != first
    (version / "sub" / "b.bin").rename(version / "b.bin")
    moved = model_digest(version, {"max_batch_size": 4})
    assert moved != first
    (version / "b.bin").write_text("c")
    assert model_digest(version, {"max_batch_size": 4}) != moved


def test_every_difference_is_told() -> None:
    plan = plan_of()
    basis = present_basis(plan, DIGEST)
    assert difference(plan.basis, basis) == ""
    here = basis.hardware
    for change, told in (
        ({"cpu": "Old CPU"}, f"the CPU was Old CPU and is {here.cpu}"),
        ({"cpus": 99}, f"the number of usable CPUs was 99 and is {here.cpus}"),
        ({"gpu": "H100"}, f"the GPU was H100 and is {here.gpu or 'none'}"),
        ({"features": (*here.features, "new")}, "differs in new"),
    ):
        other = msgspec.structs.replace(basis, hardware=msgspec.structs.replace(here, **change))
        assert told in difference(other, basis)
    assert "openvino was 1.0 and is not installed" in difference(
        msgspec.structs.replace(basis, versions={**basis.versions, "openvino": "1.0"}), basis
    )


def test_the_hardware_is_read_from_the_system(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Made Up 3000\nflags\t\t: fpu avx2 avx512_vnni amx_int8\n\n"
        "processor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n"
    )
    found = hardware(cpuinfo)
    assert found.cpu == "Made Up 3000"
    assert found.features == ("amx_int8", "avx2", "avx512_vnni")
    assert found.cpus >= 1
    assert hardware(tmp_path / "nothing").cpu == ""


def test_only_the_libraries_of_the_backend_count() -> None:
    assert list(versions("onnxruntime")) == ["onnxruntime"]
    assert versions("onnx") == versions("onnxruntime")
    assert list(versions("python")) == ["python"]
    assert versions("nobody's") == {}
