"""One run of retention, completed."""

from datetime import datetime, timedelta

from sqlalchemy import Engine

from archiver.compliance.erasure.retention import Due, Rules, expire, preview
from tests.support.erasures import NOW, TIMING, sweep

LATER = NOW + timedelta(days=40)


def run(engine: Engine, rules: Rules, now: datetime = LATER) -> Due:
    due = preview(engine, rules, now)
    for _ in expire(engine, rules, now, timing=TIMING, due=due, who="archiver"):
        pass
    sweep(engine)
    return due
