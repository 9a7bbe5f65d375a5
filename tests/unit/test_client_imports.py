"""What importing the client brings along: nothing of the server, and of the protocols' libraries only what is used."""

import subprocess
import sys

import pytest

SERVER = {"fastapi", "uvicorn", "pydantic", "typer", "onnxruntime", "torch", "headrace_backends"}


def loaded(code):
    """The modules in a fresh interpreter after ``code``."""
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(ended.stdout.split())


@pytest.mark.parametrize(
    ("url", "wanted", "unwanted"),
    [
        (None, set(), {"httpx", "grpc", "google.protobuf"}),
        ("http://127.0.0.1:1", {"httpx"}, {"grpc", "google.protobuf"}),
        ("grpc://127.0.0.1:1", {"grpc"}, {"httpx"}),
    ],
)
def test_a_client_loads_its_own_protocol_and_nothing_of_the_server(url, wanted, unwanted):
    code = "from headrace.client import AsyncClient, Client"
    if url:
        code += f"\nClient({url!r}).close()\nAsyncClient({url!r})"
    found = loaded(code)
    assert wanted <= found
    assert found.isdisjoint(unwanted | SERVER)
    ours = {".".join(name.split(".")[:2]) for name in found if name.startswith("headrace.")}
    assert ours <= {"headrace.client", "headrace.core", "headrace.wire"}


def test_the_command_line_loads_nothing_of_the_server_before_it_is_to_serve():
    assert loaded("import headrace.cli").isdisjoint(
        {"fastapi", "uvicorn", "pydantic", "uvloop", "onnxruntime", "torch"}
    )
