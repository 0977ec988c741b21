"""The tests: see docs/development.md."""

import pytest

pytest.register_assert_rewrite("tests.support")  # an assertion that fails there shows its values, too
