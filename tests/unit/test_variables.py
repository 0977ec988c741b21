"""The setting that names variables as columns of `analytics.sessions`: names, types and errors."""

import pytest

from archiver import settings
from archiver.errors import SettingsError
from archiver.settings.variables import MAX_COLUMNS, Variable, column_name, parse


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("customerTier", "customer_tier"),
        ("CustomerTier", "customer_tier"),
        ("customer_tier", "customer_tier"),
        ("customer-tier.id", "customer_tier_id"),
        ("customer tier", "customer_tier"),
        ("APIKey", "api_key"),
        ("userID2", "user_id2"),
        ("seats", "seats"),
        ("_order_", "order"),
    ],
)
def test_a_column_is_the_name_in_lower_case_with_underscores_between_words(name: str, column: str) -> None:
    assert column_name(name) == column


def test_a_list_has_names_and_types() -> None:
    assert parse(" customerTier, seats : number,isTrial:boolean ,, since:time,note:text") == (
        Variable("customerTier", "customer_tier"),
        Variable("seats", "seats", "number"),
        Variable("isTrial", "is_trial", "boolean"),
        Variable("since", "since", "time"),
        Variable("note", "note"),
    )
    assert parse("") == ()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("größe", "größe: cannot be a column"),
        ("2fa", "2fa: cannot be a column"),
        (":text", "cannot be a column"),
        ("it's", "it's: cannot be a column"),
        ("x" * 64, "at most 63 characters"),
        ("cost", "cost already is a column"),
        ("firstQuestion", "first_question already is a column"),
        ("seats:int", "seats:int: write NAME or NAME:TYPE; types are text, number, boolean, time"),
        ("seats:", "types are"),
        ("customerTier,customer_tier", "customerTier and customer_tier would both be the column customer_tier"),
        ("a,b,a", "names a variable twice"),
        (",".join(f"v{number}" for number in range(MAX_COLUMNS + 1)), "the limit is 50"),
    ],
)
def test_a_name_that_cannot_be_a_column_is_a_fault_of_the_setting(
    monkeypatch: pytest.MonkeyPatch, value: str, named: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nowhere/none")
    monkeypatch.setenv("ARCHIVER_ANALYTICS_VARIABLES", value)
    with pytest.raises(SettingsError) as fault:
        settings.read()
    assert str(fault.value).startswith("ARCHIVER_ANALYTICS_VARIABLES: ")
    assert named in str(fault.value)
