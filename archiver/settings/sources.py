"""Sources of settings: environment variables and the files that they name."""

import os
from pathlib import Path
from typing import Any

from pydantic import AliasChoices
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from archiver.errors import SettingsError


def environment_name(settings: type[BaseSettings], field_name: str) -> str:
    """Return the environment variable of a field."""
    alias = settings.model_fields[field_name].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else field_name


class FileSource(PydanticBaseSettingsSource):
    """A source that reads the files that NAME_FILE names, without byte order mark and surrounding white space."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        name = environment_name(self.settings_cls, field_name)
        path = os.environ.get(f"{name}_FILE")
        if path is None:
            return None, name, False
        if not path.strip():
            raise SettingsError(f"{name}_FILE: set, but empty: unset it, or name a file")
        if os.environ.get(name):
            raise SettingsError(f"{name} and {name}_FILE are both set: keep one of them")
        try:
            return Path(path).read_text(encoding="utf-8-sig").strip(), name, False
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SettingsError(f"{name}_FILE: cannot read {path}: {reason}") from error

    def __call__(self) -> dict[str, Any]:
        values = {}
        for field_name, field in self.settings_cls.model_fields.items():
            value, name, _ = self.get_field_value(field, field_name)
            if value is not None:
                values[name] = value
        return values
