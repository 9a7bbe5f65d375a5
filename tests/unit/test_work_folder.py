"""Folders with unfinished work: found again, never shared by two searches, and not kept for ever."""

import os

import pytest

from headrace_backends.optimize import work_folder
from headrace_backends.optimize.work_folder import MOST_AT_ONCE, MOST_KEPT, Busy, claimed


def aged(folder, name, age_s):
    (folder / name).mkdir(parents=True)
    os.utime(folder / name, (1e9 - age_s, 1e9 - age_s))
    return folder / name


def test_what_was_begun_is_found_again(tmp_path):
    with claimed(tmp_path / "work", "key") as folder:
        (folder / "rows").write_text("some")
    with claimed(tmp_path / "work", "key") as folder:
        assert (folder / "rows").read_text() == "some"
    with claimed(tmp_path / "work", "other") as folder:
        assert list(folder.iterdir()) == []


def test_two_at_once_have_a_folder_each(tmp_path):
    with claimed(tmp_path, "key") as first:
        (first / "rows").write_text("some")
        with claimed(tmp_path, "key") as second:
            assert second != first
            assert list(second.iterdir()) == []
    with claimed(tmp_path, "key") as again:
        assert again == first


def test_too_many_at_once_are_refused(tmp_path):
    with pytest.raises(Busy, match=f"^{MOST_AT_ONCE} searches"):
        claim_again(tmp_path, MOST_AT_ONCE + 1)


def claim_again(folder, times):
    with claimed(folder, "key"):
        if times > 1:
            claim_again(folder, times - 1)


def test_what_is_removed_when_all_is_done_leaves_nothing(tmp_path):
    with claimed(tmp_path, "key") as folder:
        folder.rmdir()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it another may have ended, and a third have begun."""
    looks = iter([False, True])
    monkeypatch.setattr(work_folder, "_is", lambda *_: next(looks))
    with claimed(tmp_path, "key"):
        assert next(looks, None) is None


def test_of_unfinished_work_the_last_is_kept(tmp_path):
    old = [aged(tmp_path, f".work-{place}", age_s=place) for place in range(6)]
    plan = aged(tmp_path, "plan", age_s=100)
    with claimed(tmp_path, ".work-new", ".work-") as folder:
        kept = [one for one in old if one.exists()]
        assert kept == old[: MOST_KEPT - 1]
        assert folder.exists()
        assert plan.exists()  # only what is named alike
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".lock") == [".work-new.lock"]


def test_what_another_works_in_is_not_removed(tmp_path):
    with claimed(tmp_path, "a", "") as busy:
        for place in range(MOST_KEPT):
            aged(tmp_path, f"b{place}", age_s=place)
        os.utime(busy, (1, 1))  # the oldest of all
        with claimed(tmp_path, "c", ""):
            assert busy.exists()
            assert not (tmp_path / f"b{MOST_KEPT - 1}").exists()
