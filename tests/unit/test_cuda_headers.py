"""Where PyTorch's compiler gets CUDA's headers from: an installation, or wheels as far as these have all of them."""

import pytest

from headrace_backends.optimize import cuda_headers
from headrace_backends.optimize.cuda_headers import NoCudaHeaders, cuda_home


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The folder of wheels, with what PyTorch's own bring; no CUDA is installed."""
    monkeypatch.setattr(cuda_headers.shutil, "which", lambda _: None)
    monkeypatch.setattr(cuda_headers, "_USUAL", tmp_path / "not here")
    (tmp_path / "cu13" / "include").mkdir(parents=True)
    (tmp_path / "cu13" / "include" / "cuda.h").touch()
    return tmp_path / "cu13"


def home(wheels, environment=None):
    return cuda_home("13.0", environment or {}, [wheels])


def test_wheels_that_have_all_of_them(wheels):
    with pytest.raises(
        NoCudaHeaders, match=r"pip install 'nvidia-cuda-crt==13\.0\.\*' 'nvidia-cuda-cccl==13\.0\.\*', or"
    ):
        home(wheels)
    for header in ("crt/host_defines.h", "nv/target"):
        (wheels / "include" / header).parent.mkdir()
        (wheels / "include" / header).touch()
    assert home(wheels) == str(wheels)


def test_an_installation_comes_first(wheels, monkeypatch):
    assert home(wheels, {"CUDA_HOME": "/opt/cuda"}) == home(wheels, {"CUDA_PATH": "/opt/cuda"}) == ""
    monkeypatch.setattr(cuda_headers, "_USUAL", wheels)
    assert home(wheels) == ""


@pytest.mark.usefixtures("wheels")
def test_wheels_are_looked_for_by_the_version_of_cuda(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NoCudaHeaders, match=r"pip install 'nvidia-cuda-runtime==99\.1\.\*'"):
        cuda_headers.find_for("99.1")
