"""Read all settings from the environment; one typed table defines their defaults and meanings.

NAME_FILE may contain the path of a file that contains the value of NAME, so that a secret need not be in the
environment.
"""

import os
from typing import Any, get_args

from pydantic import SecretStr, ValidationError

from archiver.errors import SettingsError
from archiver.settings.fields import Settings, WebhookScheme
from archiver.settings.sources import environment_name
from archiver.settings.unknown_variables import unknown_variables

__all__ = ["SCHEMES", "Settings", "SettingsError", "file_names", "given_as", "read", "table", "unknown_variables"]

SCHEMES: tuple[str, ...] = get_args(WebhookScheme)


def read() -> Settings:
    """Return the settings of this process.

    Raises `SettingsError` with one line per fault, which names the variable but not the value, because it may be a
    secret.
    """
    try:
        return Settings()
    except ValidationError as error:
        lines = [_explain(fault) for fault in error.errors(include_input=False, include_url=False)]
        raise SettingsError("\n".join(lines)) from None


def given_as(name: str) -> str:
    """Return the variable that provides the setting: NAME, or NAME_FILE if a file contains the value."""
    return f"{name}_FILE" if f"{name}_FILE" in os.environ else name


def _explain(fault: Any) -> str:
    if not fault["loc"]:  # a fault of several settings, named in its text
        return f"{fault['msg'].removeprefix('Value error, ')}."
    name = str(fault["loc"][0])
    field = next(field for each, field in Settings.model_fields.items() if environment_name(Settings, each) == name)
    kind, limits = fault["type"], _limits(field.metadata).strip(" .")
    limits = limits[:1].lower() + limits[1:]
    if kind in _KINDS:
        what = ", ".join(filter(None, (_KINDS[kind], limits)))
    elif kind.startswith(("greater_than", "less_than")):
        what = f"must be {limits}"
    elif kind == "literal_error":
        what = f"must be {fault['ctx']['expected']}"
    else:
        what = fault["msg"].removeprefix("Value error, ")
    return f"{given_as(name)}: {what}."


_KINDS = {
    "int_parsing": "must be a whole number, without a unit",
    "int_from_float": "must be a whole number, without a unit",
    "float_parsing": "must be a number, without a unit",
    "finite_number": "must be a number, without a unit",
    "bool_parsing": "must be true or false",
}


def file_names() -> list[str]:
    """Return the variables that may name a file with the value of a setting: NAME_FILE for each NAME."""
    return [f"{environment_name(Settings, field_name)}_FILE" for field_name in Settings.model_fields]


def table() -> list[tuple[str, str, str]]:
    """Return each setting as (variable, default as text, meaning); a test compares the documentation with it."""
    rows = []
    for field_name, field in Settings.model_fields.items():
        default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        text = str(default).lower() if isinstance(default, bool) else str("" if default is None else default)
        rows.append((environment_name(Settings, field_name), text, f"{field.description}{_limits(field.metadata)}"))
    return rows


def _limits(metadata: list[Any]) -> str:
    """Describe the limits. "Above 0" is shown as "at least 1", because such settings are whole numbers."""
    limits_given = {
        name: getattr(limit, name) for limit in metadata for name in ("ge", "gt", "le") if hasattr(limit, name)
    }
    least = limits_given.get("ge", 1 if "gt" in limits_given else None)
    maximum = limits_given.get("le")
    if least is None:
        return ""
    return f" At least {least}." if maximum is None else f" From {least} to {maximum}."
