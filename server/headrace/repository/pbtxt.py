"""Text and JSON that hold a configuration in Triton's form."""

import re

from google.protobuf import json_format, text_format

from headrace.repository.config_problems import ConfigError
from headrace.repository.from_triton import from_message
from headrace.repository.model_config import ModelConfig
from headrace.wire import pb


def parse_pbtxt(text: str, folder_name: str) -> ModelConfig:
    """The configuration that a ``config.pbtxt`` in the folder ``folder_name`` holds.

    Raises:
        ConfigError: with every problem that it has, of its grammar only the first.
    """
    message = pb.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        where = re.match(r"(\d+):(\d+) : ", str(error))
        said = str(error)[where.end() :] if where else str(error)
        place = f"line {where[1]}, column {where[2]}: " if where else ""
        raise ConfigError([f"{place}{said}"]) from error
    except RecursionError:
        raise ConfigError(["is nested too deeply"]) from None
    return from_message(message, folder_name)


def parse_json(text: str, name: str) -> ModelConfig:
    """The configuration of the model ``name`` that JSON holds. Integers may be written as strings too.

    Raises:
        ConfigError: with every problem that it has, of its grammar only the first.
    """
    message = pb.ModelConfig()
    if not text.lstrip().startswith("{"):  # an empty list would be taken for an empty message
        raise ConfigError(["is no model configuration in JSON: expected an object"])
    try:
        json_format.Parse(text, message)
    except json_format.ParseError as error:
        raise ConfigError([f"is no model configuration in JSON: {error}"]) from error
    except RecursionError:
        raise ConfigError(["is nested too deeply"]) from None
    return from_message(message, name)
