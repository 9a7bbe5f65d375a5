"""Log and trace settings over gRPC."""

from collections.abc import Callable
from typing import Any

from headrace.core.errors import NotFound
from headrace.log_settings import LogSettings
from headrace.tracing import Tracer
from headrace.wire import pb


class SettingsService:
    """The RPCs of the logging and the trace extension, each a method of its name."""

    def __init__(self, log_settings: LogSettings, tracer: Tracer, has_model: Callable[[str], bool]) -> None:
        self._log_settings = log_settings
        self._tracer = tracer
        self._has_model = has_model

    async def LogSettings(self, request: Any, _: Any) -> Any:  # noqa: N802 - the protocol's name
        """Change what is given of what the server logs, and tell all of it."""
        given = {}
        for key, value in request.settings.items():
            choice = value.WhichOneof("parameter_choice")
            given[key] = None if choice is None else getattr(value, choice)
        self._log_settings.change(given)
        response = pb.LogSettingsResponse()
        for key, now in self._log_settings.values().items():
            setting = response.settings[key]
            if isinstance(now, bool):
                setting.bool_param = now
            elif isinstance(now, int):
                setting.uint32_param = now
            else:
                setting.string_param = now
        return response

    async def TraceSetting(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Change what is given of what is traced, and tell all of it. A setting without values is taken back."""
        model = request.model_name
        if model and not self._has_model(model):
            raise NotFound(f"Request for unknown model: '{model}' is not found")
        self._tracer.change({key: list(given.value) or None for key, given in request.settings.items()}, model)
        response = pb.TraceSettingResponse()
        for key, now in self._tracer.settings(model).values().items():
            response.settings[key].value.extend([now] if isinstance(now, str) else now)
        return response
