"""Random conversations whose truth is known, aligned with what was lost of them: none may be wrong and not say so,
and none ambiguous without a reason.

Part of `make soak`; alone: `.venv/bin/python -m tests.bench.assignment`.
"""

import argparse
import sys
import time

from tests.support.conversations import Tally, tally

CONVERSATIONS, SKEWED = 11_621, 68_380


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.bench.assignment", description=__doc__).parse_args()
    started = time.monotonic()
    result = [_report("true times", tally(range(CONVERSATIONS)))]
    result.append(_report("times wrong by up to 40 s", tally(range(SKEWED), is_skewed=True)))
    print(f"in {time.monotonic() - started:.0f} s", flush=True)
    if any(each.wrong or each.needless for each in result):
        sys.exit(1)


def _report(name: str, found: Tally) -> Tally:
    print(f"{name}: {found}", flush=True)
    if found.wrong:
        print(f"wrong: seeds {found.wrong}", flush=True)
    if found.needless:
        print(f"ambiguous without a reason: seeds {found.needless}", flush=True)
    return found


if __name__ == "__main__":
    main()
