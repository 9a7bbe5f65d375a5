"""Imports the module ``openvino`` with its telemetry turned off.

Importing it, and converting or quantising with it, sends messages to a statistics service unless the user has said no
in a file of his home. A server has nobody to ask and does not phone: OpenVINO and NNCF take the sender's package for
not installed, and go without.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None: an import of it fails

import openvino as ov  # noqa: E402 - what is above has to come first

__all__ = ["ov"]
