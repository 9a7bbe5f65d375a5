"""The gRPC messages: ``pb.ModelInferRequest`` and all others of ``proto/``, with the services' procedures.

The classes are made from ``inference.binpb`` when this is imported; ``__init__.pyi`` tells type checkers of them.
``make proto`` writes both.
"""

from pathlib import Path

from headrace.wire.pb.descriptors import Rpc, load, rpcs_of, types_of

__all__ = ["HEALTH_RPCS", "HEALTH_SERVICE", "RPCS", "SERVICE", "Rpc"]

_files = load(Path(__file__).with_name("inference.binpb"))
_services = {service.full_name: service for file in _files for service in file.services_by_name.values()}

SERVICE = "inference.GRPCInferenceService"
RPCS = rpcs_of(_services[SERVICE])
HEALTH_SERVICE = "grpc.health.v1.Health"
HEALTH_RPCS = rpcs_of(_services[HEALTH_SERVICE])

for _file in _files:
    globals().update(types_of(_file))
