"""The compiled protocol: fresh, equal to Triton's but for listed additions, and exchangeable with it byte for byte."""

import ast
import importlib.util
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from tritonclient.grpc import model_config_pb2 as triton_config
from tritonclient.grpc import service_pb2 as triton

from headrace.wire import pb
from headrace.wire.pb.descriptors import load

ROOT = Path(__file__).resolve().parents[2]
GENERATED = Path(pb.__file__).parent

STRING, BOOL, MESSAGE, ENUM = (
    FieldDescriptorProto.TYPE_STRING,
    FieldDescriptorProto.TYPE_BOOL,
    FieldDescriptorProto.TYPE_MESSAGE,
    FieldDescriptorProto.TYPE_ENUM,
)
ONE, MANY = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED

# KServe's fields, under numbers that Triton leaves unused: everything else must be exactly Triton's.
PROPERTIES_ENTRY = "inference.ModelMetadataResponse.PropertiesEntry"
ADDED_FIELDS = {
    ("inference.ModelMetadataResponse", "properties"): (6, MESSAGE, MANY, f".{PROPERTIES_ENTRY}", None),
    (PROPERTIES_ENTRY, "key"): (1, STRING, ONE, "", None),
    (PROPERTIES_ENTRY, "value"): (2, STRING, ONE, "", None),
    ("inference.RepositoryModelLoadResponse", "model_name"): (1, STRING, ONE, "", None),
    ("inference.RepositoryModelLoadResponse", "isLoaded"): (2, BOOL, ONE, "", None),
    ("inference.RepositoryModelUnloadResponse", "model_name"): (1, STRING, ONE, "", None),
    ("inference.RepositoryModelUnloadResponse", "isUnloaded"): (2, BOOL, ONE, "", None),
}
ADDED_MESSAGES = {PROPERTIES_ENTRY}


def as_proto(file) -> FileDescriptorProto:
    return FileDescriptorProto.FromString(file.serialized_pb)


def our_files(package: str) -> list[FileDescriptorProto]:
    files = [as_proto(file) for file in load(GENERATED / "inference.binpb")]
    return [file for file in files if file.package == package]


def triton_files() -> list[FileDescriptorProto]:
    return [as_proto(triton_config.DESCRIPTOR), as_proto(triton.DESCRIPTOR)]


def messages_in(files: list[FileDescriptorProto]) -> dict[str, DescriptorProto]:
    found: dict[str, DescriptorProto] = {}

    def visit(prefix: str, messages) -> None:
        for message in messages:
            found[f"{prefix}.{message.name}"] = message
            visit(f"{prefix}.{message.name}", message.nested_type)

    for file in files:
        visit(file.package, file.message_type)
    return found


def enums_in(files: list[FileDescriptorProto]) -> dict[str, dict[str, int]]:
    owned: list[tuple[str, EnumDescriptorProto]] = [(file.package, enum) for file in files for enum in file.enum_type]
    owned += [(name, enum) for name, message in messages_in(files).items() for enum in message.enum_type]
    return {f"{owner}.{enum.name}": {value.name: value.number for value in enum.value} for owner, enum in owned}


def fields_in(files: list[FileDescriptorProto]) -> dict[tuple[str, str], tuple]:
    found = {}
    for name, message in messages_in(files).items():
        for field in message.field:
            oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None
            found[name, field.name] = (field.number, field.type, field.label, field.type_name, oneof)
    return found


def rpcs_in(files: list[FileDescriptorProto]) -> dict[str, tuple]:
    return {
        f"{file.package}.{service.name}/{method.name}": (
            method.input_type,
            method.output_type,
            method.client_streaming,
            method.server_streaming,
        )
        for file in files
        for service in file.service
        for method in service.method
    }


class TestAgainstTriton:
    def test_messages(self):
        theirs = messages_in(triton_files())
        ours = messages_in(our_files("inference"))
        assert len(theirs) > 100
        assert ours.keys() == theirs.keys() | ADDED_MESSAGES
        for name, message in theirs.items():
            assert ours[name].options.map_entry == message.options.map_entry, name

    def test_fields(self):
        theirs = fields_in(triton_files())
        assert len(theirs) > 250
        assert not theirs.keys() & ADDED_FIELDS.keys()
        assert fields_in(our_files("inference")) == theirs | ADDED_FIELDS

    def test_enums(self):
        theirs = enums_in(triton_files())
        assert "inference.ModelInstanceGroup.SecondaryDevice.SecondaryDeviceKind" in theirs
        assert enums_in(our_files("inference")) == theirs

    def test_rpcs(self):
        theirs = rpcs_in(triton_files())
        assert len(theirs) == 20
        assert rpcs_in(our_files("inference")) == theirs


def test_health_is_grpcs_own():
    files = our_files("grpc.health.v1")
    assert fields_in(files) == {
        ("grpc.health.v1.HealthCheckRequest", "service"): (1, STRING, ONE, "", None),
        ("grpc.health.v1.HealthCheckResponse", "status"): (
            1,
            ENUM,
            ONE,
            ".grpc.health.v1.HealthCheckResponse.ServingStatus",
            None,
        ),
    }
    assert enums_in(files) == {
        "grpc.health.v1.HealthCheckResponse.ServingStatus": {
            "UNKNOWN": 0,
            "SERVING": 1,
            "NOT_SERVING": 2,
            "SERVICE_UNKNOWN": 3,
        }
    }
    request, response = ".grpc.health.v1.HealthCheckRequest", ".grpc.health.v1.HealthCheckResponse"
    assert rpcs_in(files) == {
        "grpc.health.v1.Health/Check": (request, response, False, False),
        "grpc.health.v1.Health/Watch": (request, response, False, True),
    }


def test_committed_files_are_what_the_sources_compile_to():
    pytest.importorskip("grpc_tools", reason="grpcio-tools, which compiles proto/, is not installed")
    spec = importlib.util.spec_from_file_location("headrace_proto_compile", ROOT / "proto" / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compiled = module.compiled()
    assert sorted(compiled) == ["__init__.pyi", "inference.binpb"]
    for name, content in compiled.items():
        # Not by ==, whose report of two long byte strings would bury the remedy.
        fresh = (GENERATED / name).read_bytes() == content
        assert fresh, f"{GENERATED / name} is older than proto/: run `make proto`"


def stub_classes(body: list[ast.stmt], prefix: str = "") -> list[str]:
    names = []
    for node in body:
        if isinstance(node, ast.ClassDef):
            names += [prefix + node.name, *stub_classes(node.body, f"{prefix}{node.name}.")]
    return names


def test_stub_names_exactly_what_exists():
    tree = ast.parse((GENERATED / "__init__.pyi").read_text())
    files = our_files("inference") + our_files("grpc.health.v1")
    packages = ("inference.", "grpc.health.v1.")
    existing = {
        name.removeprefix(package)
        for name in messages_in(files) | enums_in(files)
        for package in packages
        if name.startswith(package)
    }
    declared = stub_classes(tree.body)
    assert len(declared) == len(set(declared))
    assert set(declared) == existing
    for name in declared:
        found = pb
        for part in name.split("."):
            found = getattr(found, part)
        assert found.DESCRIPTOR.full_name in {package + name for package in packages}


class TestModule:
    def test_pool_is_private(self):
        ours = pb.ModelInferRequest.DESCRIPTOR
        assert ours.file.pool is not descriptor_pool.Default()
        assert pb.HealthCheckRequest.DESCRIPTOR.file.pool is ours.file.pool
        assert ours is not triton.ModelInferRequest.DESCRIPTOR
        assert descriptor_pool.Default().FindMessageTypeByName(ours.full_name) is triton.ModelInferRequest.DESCRIPTOR

    def test_enums_convert_both_ways(self):
        assert pb.DataType.Value("TYPE_BF16") == pb.DataType.TYPE_BF16 == 14
        assert pb.DataType.Name(13) == "TYPE_STRING"
        assert pb.ModelInstanceGroup.KIND_CPU == pb.ModelInstanceGroup.Kind.Value("KIND_CPU") == 2

    def test_rpcs_keep_order_and_classes(self):
        assert list(pb.RPCS)[:6] == [
            "ServerLive",
            "ServerReady",
            "ModelReady",
            "ServerMetadata",
            "ModelMetadata",
            "ModelInfer",
        ]
        assert len(pb.RPCS) == 20
        assert pb.RPCS["ModelInfer"] == (pb.ModelInferRequest, pb.ModelInferResponse, False, False)
        assert pb.RPCS["ModelStreamInfer"] == (pb.ModelInferRequest, pb.ModelStreamInferResponse, True, True)
        streaming = [name for name, rpc in pb.RPCS.items() if rpc.client_streaming or rpc.server_streaming]
        assert streaming == ["ModelStreamInfer"]
        assert {name: rpc.server_streaming for name, rpc in pb.HEALTH_RPCS.items()} == {"Check": False, "Watch": True}
        assert pb.HEALTH_RPCS["Check"][:2] == (pb.HealthCheckRequest, pb.HealthCheckResponse)

    def test_service_names_are_the_paths_that_clients_call(self):
        assert triton.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name == pb.SERVICE
        assert pb.HEALTH_SERVICE == "grpc.health.v1.Health"


CONTENTS = {
    "bool_contents": [True, False],
    "int_contents": [-(2**31), 2**31 - 1],
    "int64_contents": [-(2**63), 2**63 - 1],
    "uint_contents": [0, 2**32 - 1],
    "uint64_contents": [0, 2**64 - 1],
    "fp32_contents": [0.5, float("-inf")],
    "fp64_contents": [1e-300, 1e300],
    "bytes_contents": [b"", b"\x00\xff not text"],
}
PARAMETERS = {
    "bool_param": False,
    "int64_param": -(2**63),
    "string_param": "größe",
    "double_param": 0.1,
    "uint64_param": 2**64 - 1,
}


def full_request(module):
    """A request with every field set, every kind of contents and every kind of parameter, of ``module``'s classes."""
    parameters = {kind: module.InferParameter(**{kind: value}) for kind, value in PARAMETERS.items()}
    request = module.ModelInferRequest
    return request(
        model_name="m",
        model_version="3",
        id="a-1",
        parameters=parameters,
        inputs=[
            request.InferInputTensor(
                name=kind,
                datatype="ANY",
                shape=[-1, 2],
                parameters=parameters,
                contents=module.InferTensorContents(**{kind: values}),
            )
            for kind, values in CONTENTS.items()
        ],
        outputs=[request.InferRequestedOutputTensor(name="y", parameters=parameters)],
        raw_input_contents=[b"", bytes(range(256))],
    )


class TestExchange:
    def test_samples_cover_every_field(self):
        assert set(CONTENTS) == set(triton.InferTensorContents.DESCRIPTOR.fields_by_name)
        assert set(PARAMETERS) == set(triton.InferParameter.DESCRIPTOR.fields_by_name)
        assert len(full_request(triton).ListFields()) == len(triton.ModelInferRequest.DESCRIPTOR.fields)

    @pytest.mark.parametrize(("sender", "receiver"), [(triton, pb), (pb, triton)], ids=["from_triton", "to_triton"])
    def test_full_request(self, sender, receiver):
        sent = full_request(sender)
        received = receiver.ModelInferRequest.FromString(sent.SerializeToString())
        assert received == full_request(receiver)
        for tensor in received.inputs:
            assert list(getattr(tensor.contents, tensor.name)) == CONTENTS[tensor.name]
        for owner in (received, received.inputs[0], received.outputs[0]):
            assert {kind: getattr(owner.parameters[kind], kind) for kind in owner.parameters} == PARAMETERS
            assert all(owner.parameters[kind].WhichOneof("parameter_choice") == kind for kind in PARAMETERS)
        back = received.SerializeToString(deterministic=True)
        assert back == sent.SerializeToString(deterministic=True)

    def test_triton_client_passes_over_what_is_added(self):
        reply = pb.RepositoryModelLoadResponse(model_name="m", isLoaded=True)
        received = triton.RepositoryModelLoadResponse.FromString(reply.SerializeToString())
        assert received.ListFields() == []
        metadata = pb.ModelMetadataResponse(name="m", platform="p", properties={"licence": "MIT"})
        assert triton.ModelMetadataResponse.FromString(metadata.SerializeToString()).platform == "p"

    def test_kserve_load_request_names_the_model_in_the_first_field(self):
        # Field 1, length-delimited, three bytes: what KServe's client sends as model_name.
        request = pb.RepositoryModelLoadRequest.FromString(b"\x0a\x03abc")
        assert (request.repository_name, request.model_name) == ("abc", "")
