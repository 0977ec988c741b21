"""Fixtures of the tests that need Postgres but no process."""

import pytest
from sqlalchemy import Engine

from tests.support.histories import Archive


@pytest.fixture
def archive(engine: Engine) -> Archive:
    return Archive(engine)
