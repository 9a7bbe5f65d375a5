"""Which group a path or an RPC is of, and who may use it."""

import inspect
import re
from unittest.mock import MagicMock

import pytest
from fastapi.routing import APIRoute

from headrace.core.errors import Kind
from headrace.frontends.http_settings import add_settings
from headrace.frontends.restrictions import GROUPS, Restrictions, grpc_group, http_group
from headrace.wire import pb

PATHS = {
    "/v2/health/live": "health",
    "/v2/health/ready": "health",
    "/v2/models/m/ready": "health",
    "/v2/models/m/versions/1/ready": "health",
    "/v2": "metadata",
    "/v2/": "metadata",
    "/v2/models": "metadata",
    "/v2/models/m": "metadata",
    "/v2/models/infer": "metadata",
    "/v2/models/m/versions/1": "metadata",
    "/v2/models/m/infer": "inference",
    "/v2/models/m/versions/1/infer": "inference",
    "/v2/models/m/generate": "inference",
    "/v2/models/m/versions/1/generate": "inference",
    "/v2/models/m/generate_stream": "inference",
    "/v2/models/m/versions/1/generate_stream": "inference",
    "/v2/models/m/infer_stream": "inference",
    "/v2/models/m/versions/1/infer_stream": "inference",
    "/v2/models/a/b/infer": "inference",
    "/v2/models/m/config": "model-config",
    "/v2/models/m/versions/1/config": "model-config",
    "/v2/models/stats": "statistics",
    "/v2/models/m/stats": "statistics",
    "/v2/models/m/versions/1/stats": "statistics",
    "/v2/repository/index": "model-repository",
    "/v2/repository/models/m/load": "model-repository",
    "/v2/repository/models/m/unload": "model-repository",
    "/v2/repository/models/m/plan": "model-repository",
    "/v2/repository/r/index": "model-repository",
    "/v2/repository/r/models/m/load": "model-repository",
    "/v2/systemsharedmemory/status": "shared-memory",
    "/v2/systemsharedmemory/region/r/status": "shared-memory",
    "/v2/systemsharedmemory/region/r/register": "shared-memory",
    "/v2/systemsharedmemory/unregister": "shared-memory",
    "/v2/systemsharedmemory/region/r/unregister": "shared-memory",
    "/v2/cudasharedmemory/status": "shared-memory",
    "/v2/cudasharedmemory/region/r/status": "shared-memory",
    "/v2/cudasharedmemory/region/r/register": "shared-memory",
    "/v2/cudasharedmemory/unregister": "shared-memory",
    "/v2/cudasharedmemory/region/r/unregister": "shared-memory",
    "/v2/trace/setting": "trace",
    "/v2/models/m/trace/setting": "trace",
    "/v2/models/m/recording": "trace",
    "/v2/models/m/versions/1/recording": "trace",
    "/v2/models/m/recording/file": "trace",
    "/v2/logging": "logging",
}
ALL = Restrictions.parse([f"{','.join(GROUPS)}:Admin-Key=s3cret=:x"])


@pytest.mark.parametrize(("path", "group"), PATHS.items())
def test_every_path_of_the_protocol_has_its_group(path, group):
    assert http_group(path) == group
    # The router takes a line's end behind a path, and anything but a slash in a name.
    assert http_group(path + "\n") == group
    assert http_group(path.replace("/m/", "/a\nb %/").replace("/r/", "/a\nb %/")) == group


@pytest.mark.parametrize("path", ["/", "", "/metrics", "/docs", "/openapi.json", "/v3/models/m", "/v2/nothing"])
def test_other_paths_have_none(path):
    assert http_group(path) == ""
    assert ALL.http_problem(path, []) is None


def test_the_router_knows_no_path_that_has_no_group():
    """Asked of the whole application, so that a new path cannot be forgotten here."""
    from headrace.frontends import http  # here, where nobody else's import can fail with it

    app = http.create_app(**{name: MagicMock() for name in inspect.signature(http.create_app).parameters})
    add_settings(app, MagicMock(), MagicMock(), bool)
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.path.startswith("/v2")]
    assert len(routes) > 20
    for route in routes:
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        assert http_group(path), f"{route.path} is in no group"
        assert route.path_regex.match(path)


def test_every_rpc_has_its_group():
    for rpc in (*pb.RPCS, *pb.HEALTH_RPCS):
        assert grpc_group(rpc) in GROUPS, rpc
    assert {grpc_group(rpc) for rpc in pb.RPCS} == set(GROUPS)
    assert grpc_group("Nothing") == ""


@pytest.mark.parametrize(
    ("rpc", "path"),
    [
        ("ServerLive", "/v2/health/live"),
        ("ServerReady", "/v2/health/ready"),
        ("ModelReady", "/v2/models/m/ready"),
        ("Check", "/v2/health/ready"),
        ("ServerMetadata", "/v2"),
        ("ModelMetadata", "/v2/models/m"),
        ("ModelInfer", "/v2/models/m/infer"),
        ("ModelStreamInfer", "/v2/models/m/generate_stream"),
        ("ModelConfig", "/v2/models/m/config"),
        ("ModelStatistics", "/v2/models/stats"),
        ("RepositoryIndex", "/v2/repository/index"),
        ("RepositoryModelLoad", "/v2/repository/models/m/load"),
        ("RepositoryModelUnload", "/v2/repository/models/m/unload"),
        ("SystemSharedMemoryRegister", "/v2/systemsharedmemory/region/r/register"),
        ("CudaSharedMemoryStatus", "/v2/cudasharedmemory/status"),
        ("TraceSetting", "/v2/trace/setting"),
        ("LogSettings", "/v2/logging"),
    ],
)
def test_both_protocols_are_restricted_alike(rpc, path):
    assert grpc_group(rpc) == http_group(path)


# -- asking ---------------------------------------------------------------------------------------------------


def test_without_rules_all_is_open():
    nothing = Restrictions.parse([])
    assert not nothing.active
    assert nothing.http_problem("/v2/logging", []) is None
    assert nothing.grpc_problem("LogSettings", []) is None
    assert ALL.active


@pytest.mark.parametrize("path", PATHS)
def test_http_needs_the_header(path):
    for headers in ([], [(b"admin-key", b"s3cret")], [(b"admin-key", b"")], [(b"other", b"s3cret=:x")]):
        problem = ALL.http_problem(path, headers)
        assert problem.kind is Kind.RESTRICTED
        assert str(problem) == "This API is restricted, expecting header 'Admin-Key'"
    assert ALL.http_problem(path, [(b"host", b"x"), (b"admin-key", b"s3cret=:x")]) is None
    assert ALL.group_problem(http_group(path), [(b"admin-key", b"s3cret=:x")]) is None


@pytest.mark.parametrize("rpc", [*pb.RPCS, *pb.HEALTH_RPCS])
def test_grpc_needs_the_header_with_its_prefix(rpc):
    name = "triton-grpc-protocol-admin-key"
    for metadata in ([], [(name, "no")], [("admin-key", "s3cret=:x")]):
        problem = ALL.grpc_problem(rpc, metadata)
        assert problem.kind is Kind.RESTRICTED
        assert str(problem) == "This API is restricted, expecting header 'triton-grpc-protocol-Admin-Key'"
    assert ALL.grpc_problem(rpc, [("user-agent", "x"), (name, "s3cret=:x")]) is None


def test_binary_metadata_and_odd_bytes_do_no_harm():
    rules = Restrictions.parse(["inference:key-bin=v"])
    assert rules.grpc_problem("ModelInfer", [("triton-grpc-protocol-key-bin", b"v")]) is None
    assert rules.grpc_problem("ModelInfer", [("triton-grpc-protocol-key-bin", b"\xff")]) is not None
    assert rules.grpc_problem("ModelInfer", [("triton-grpc-protocol-key-bin", "\u00e4")]) is not None
    assert rules.http_problem("/v2/models/m/infer", [(b"key-bin", b"\xff\xfe")]) is not None


def test_groups_may_have_keys_of_their_own():
    rules = Restrictions.parse(["model-repository,logging:admin=a", "inference:user=b"])
    assert rules.http_problem("/v2/logging", [(b"admin", b"a")]) is None
    assert rules.http_problem("/v2/logging", [(b"user", b"b")]) is not None
    assert rules.http_problem("/v2/models/m/infer", [(b"user", b"b")]) is None
    assert rules.http_problem("/v2/models/m/infer", [(b"admin", b"b")]) is not None
    assert rules.http_problem("/v2/models/m", []) is None
    assert rules.grpc_problem("RepositoryIndex", []) is not None


# -- the flag -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ("", "form GROUP"),
        ("inference", "form GROUP"),
        ("inference:admin", "form GROUP"),
        ("inference=admin:s3cret", "form GROUP"),
        ("infer:admin=s3cret", "'infer'"),
        (":admin=s3cret", "''"),
        ("inference,:admin=s3cret", "''"),
        ("Inference:admin=s3cret", "'Inference'"),
        ("inference,inference:admin=s3cret", "restricted already"),
        ("inference:=s3cret", "''"),
        ("inference:ad min=s3cret", "'ad min'"),
        ("inference:admin=", "'admin'"),
        ("inference:admin= s3cret", "'admin'"),
        ("inference:admin=s3cret\u00e4", "'admin'"),
    ],
)
def test_a_wrong_rule_is_refused_without_telling_the_secret(rule, named):
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        Restrictions.parse(["health:key=value", rule])
    assert "number 2" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError, match=r"number 1.*'infer'.*number 2.*form.*number 3.*restricted already"):
        Restrictions.parse(["health,infer:a=b", "logging", "health:a=b"])
