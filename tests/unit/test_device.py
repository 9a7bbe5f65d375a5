"""Names of devices: which there are, what a process for one sees."""

import pytest

from headrace.core.device import gpu_number, gpu_uuid, is_device, visible_gpus

HEX = "5a3c1f00-0b1d-4f5e-9c7a-0123456789ab"


@pytest.mark.parametrize(
    ("device", "number", "uuid"),
    [
        ("cpu", None, ""),
        ("gpu:0", 0, ""),
        ("gpu:12", 12, ""),
        (f"gpu:GPU-{HEX}", 0, f"GPU-{HEX}"),
        (f"gpu:MIG-{HEX}", 0, f"MIG-{HEX}"),
        (f"gpu:MIG-GPU-{HEX}/1/0", 0, f"MIG-GPU-{HEX}/1/0"),
    ],
)
def test_devices_that_there_are(device, number, uuid):
    assert is_device(device)
    assert gpu_number(device) == number
    assert gpu_uuid(device) == uuid


@pytest.mark.parametrize(
    "device",
    ["", "gpu", "gpu:", "gpu:01", "gpu:1000", "GPU-" + HEX, "gpu:GPU-5a3c1f00", f"gpu:MIG-GPU-{HEX}", f"gpu:TPU-{HEX}",
     f"gpu:GPU-{HEX}\n", "gpu:0,1", "cuda:0"],
)  # fmt: skip
def test_devices_that_there_are_not(device):
    assert not is_device(device)
    with pytest.raises(ValueError, match="is unknown, expected 'cpu', 'gpu:N' or 'gpu:UUID'"):
        gpu_number(device)


@pytest.mark.parametrize("device", ["cpu", "gpu:0", "gpu:3"])
@pytest.mark.parametrize("inherited", [None, "", "2,3", "GPU-5a"])
def test_what_has_no_uuid_sees_what_the_server_sees(device, inherited):
    assert visible_gpus(device, inherited) is None


@pytest.mark.parametrize("inherited", [None, f"GPU-{HEX}", "GPU-77, GPU-5a3c", "0,1"])
def test_a_uuid_is_all_that_its_process_sees(inherited):
    assert visible_gpus(f"gpu:GPU-{HEX}", inherited) == f"GPU-{HEX}"


@pytest.mark.parametrize("inherited", ["", "-1", "GPU-77", f"MIG-{HEX}", ",", "NoDevFiles"])
def test_a_uuid_that_the_server_was_not_given_is_refused(inherited):
    with pytest.raises(ValueError, match="is not among the GPUs that this server may use: CUDA_VISIBLE_DEVICES is"):
        visible_gpus(f"gpu:GPU-{HEX}", inherited)
