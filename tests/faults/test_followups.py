"""Follow-ups while workers, receivers and Postgres are killed (I11): each change that matches, and no other."""

import random
from pathlib import Path

from archiver import embedded
from tests.conftest import Cluster
from tests.support.recordings import survive


def test_i11_deliveries_equal_the_changes_whichever_process_is_killed(
    postgres: embedded.Postgres, own: Cluster, url: str, tmp_path: Path
) -> None:
    engine = own.engine(url)
    try:
        survive(postgres, engine, url, tmp_path, events=250, rng=random.Random(20260105))
    finally:
        engine.dispose()
