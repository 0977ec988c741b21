"""The choice of one version of Postgres."""

import pytest

from tests.support import servers

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
