"""Name the environment variables, of those that libraries read themselves, that may have caused an error."""

import os
from collections.abc import Collection

# Names in lower case; the environment may contain them in upper or lower case.
TLS = ("ssl_cert_file", "ssl_cert_dir", "sslkeylogfile")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def advice_on(error: BaseException, names: Collection[str]) -> str:
    """Return advice to check the given variables that are set, or only those whose value the error quotes."""
    present = sorted(name for name in os.environ if name.lower() in names)
    quoted = [name for name in present if os.environ[name] and os.environ[name] in str(error)]
    variables = ", ".join(quoted or present)
    return f"check {variables} in the environment" if variables else "check the installed libraries"


def describe(error: BaseException) -> str:
    """Return type and text of a library's error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.') or 'no further detail'}"
