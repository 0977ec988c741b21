"""What analysts' questions cost: `make bench-analytics`.

Fills archives of two sizes through the ledger, whose newest 90 days are the same, and asks thirty questions as
`archiver_reader`. Prints buffers and rows read, and how they grow. Exits 1 if a question about some days or one thing
reads more than 1.5 times as many buffers in the larger archive, or reads a large table whole, or if a question
exceeds its budget. The queries of docs/analytics.md have the same bounds. Questions about the whole archive
are listed separately.
"""

import sys
from collections.abc import Iterator, Mapping

import psycopg

from archiver.database import roles
from tests.bench.archives import archives, parse_sizes
from tests.support.analysts import (
    QUESTIONS,
    Cost,
    Question,
    asked,
    measure,
    worked_queries,
)

GROWTH = 1.5
NOISE = 10  # buffers: each index may have one level more in the larger archive
GROWING = {"Conversations of a customer"}  # worked queries whose results grow with the archive


def main() -> None:
    small, large = map(costs, archives(parse_sizes("bench-analytics", __doc__)))
    print("About some days, or one thing:")
    broken = [line for question in QUESTIONS if question.kind != "all" for line in report(question, small, large)]
    print("About the whole archive:")
    broken += [line for question in QUESTIONS if question.kind == "all" for line in report(question, small, large)]
    print("Worked queries of docs/analytics.md:")
    worked = [name for name in large if name not in {each.name for each in QUESTIONS}]
    for name in worked:
        broken += report(Question(name, "all" if name in GROWING else "window", ""), small, large)
    if broken:
        sys.exit("bench-analytics: " + "; ".join(broken))


def costs(url: str) -> Mapping[str, Cost]:
    """What each question costs in this archive."""
    with psycopg.connect(url) as connection:
        queries = {each.name: asked(connection, each) for each in QUESTIONS} | worked_queries(connection)
        connection.execute(f"SET ROLE {roles.READER}")
        return {name: measure(connection, query) for name, query in queries.items()}


def report(question: Question, small: Mapping[str, Cost], large: Mapping[str, Cost]) -> Iterator[str]:
    """Print the costs of a question, and yield the bounds that it breaks."""
    before, after = small[question.name], large[question.name]
    growth = after.buffers / max(before.buffers, 1)
    print(
        f"{question.name:<52} {question.kind:<6} {before.buffers:>9,} {after.buffers:>9,} buffers {growth:>6.2f}"
        f" {before.rows:>9,} {after.rows:>9,} rows {' '.join(sorted(after.whole))}"
    )
    if question.budget is not None and after.buffers > question.budget:
        yield f"{question.name}: {after.buffers} buffers, at most {question.budget}"
    if question.kind != "all":
        if after.buffers > GROWTH * before.buffers + NOISE:
            yield f"{question.name}: grew {growth:.2f} times"
        if after.whole:
            yield f"{question.name}: reads all of {', '.join(sorted(after.whole))}"


if __name__ == "__main__":
    main()
