"""What lies in a repository's folder, and what does not."""

from headrace.repository.disk import Absent, Disk


def test_a_model_is_read_as_it_is_now(tmp_path):
    disk = Disk(tmp_path)
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(b"weights")
    assert disk.names() == ["m"]
    assert disk.has("m")
    assert list(disk.read("m").versions) == [1]
    (tmp_path / "m" / "1").rename(tmp_path / "m" / "2")
    assert list(disk.read("m").versions) == [2]


def test_a_model_that_is_gone_is_told_from_a_folder_that_is_away(tmp_path):
    assert Disk(tmp_path).read("m") is Absent.MODEL
    assert not Disk(tmp_path).has("m")
    away = Disk(tmp_path / "not mounted")
    assert away.read("m") is Absent.REPOSITORY
    assert away.names() == []
    assert not away.has("m")
