# Everything runs from .venv, which is built from requirements.lock the first time and whenever that changes.
# Python of your choice: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
LOCK := $(BIN)/python -m uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header
.DEFAULT_GOAL := help
.PHONY: help demo run test test-quick test-browser screenshots check lint bench bench-backfill bench-overload bench-seals bench-export bench-followups bench-long bench-analytics bench-console soak schema lock clean

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'Installing into $(VENV) (once) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'Python lacks its venv module; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@$(PIP) --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# dbt and what it needs, in an environment of its own: it does not accept the versions of our own tools.
$(VENV)/dbt/.installed: $(VENV)/.installed deploy/analytics/requirements.lock
	@echo 'Installing dbt into $(VENV)/dbt (once) ...'
	@test -x $(VENV)/dbt/bin/python || $(BIN)/python -m venv $(VENV)/dbt
	@$(VENV)/dbt/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes -r deploy/analytics/requirements.lock
	@touch $@

demo: $(VENV)/.installed  ## See it work: a database, the receiver and a simulated CallHQ (DEMO_ARGS=--exit ends by itself)
	@$(BIN)/python -m archiver demo $(DEMO_ARGS)

run: $(VENV)/.installed  ## Receive real webhooks on an embedded Postgres (needs ARCHIVER_WEBHOOK_SECRETS, or ARGS=--insecure)
	@$(BIN)/python -m archiver serve $(ARGS)

test: $(VENV)/.installed $(VENV)/dbt/.installed  ## Run the tests, six at a time (TEST_ARGS goes to pytest)
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -n 6 --dist worksteal $(TEST_ARGS)

test-quick: $(VENV)/.installed  ## Run the tests that need neither Postgres nor a process, in less than a minute
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit $(TEST_ARGS)

$(VENV)/.browser: $(VENV)/.installed requirements-browser.lock
	@$(PIP) --require-hashes -r requirements-browser.lock
	@touch $@

test-browser: $(VENV)/.browser  ## Use the console with a real browser (needs Debian's chromium)
	@$(BIN)/python -m pytest -q tests/browser $(TEST_ARGS)

screenshots: $(VENV)/.browser  ## Make the pictures in docs/screenshots from a demo (needs Debian's chromium)
	@$(BIN)/python -m tests.screenshots

check: lint  ## Everything but the tests: style, types, rooms, documentation, branch coverage of the last test run
	@$(BIN)/python -m pytest -q tests/database/test_docs.py
	@if ls .coverage* >/dev/null 2>&1; then $(BIN)/coverage combine --quiet 2>/dev/null; $(BIN)/coverage report || { echo 'That is the coverage of the last test run: after TEST_ARGS it is that of a part. Run make test, then make check.' >&2; exit 1; }; else echo 'No coverage to report: run make test first.'; fi

lint: $(VENV)/.installed  ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.installed  ## Measure ingest against its baselines (needs wrk)
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

bench-backfill: $(VENV)/.installed  ## Measure backfill against a simulated CallHQ whose histories take 50 ms
	@$(BIN)/python -m tests.bench.backfill $(BENCH_ARGS)

bench-overload: $(VENV)/.installed  ## Measure the receiver under four times the senders that it can serve (needs wrk)
	@$(BIN)/python -m tests.bench.overload $(BENCH_ARGS)

bench-seals: $(VENV)/.installed  ## Measure sealing and verification of a million events (--beside: what it costs ingest)
	@$(BIN)/python -m tests.bench.seals $(BENCH_ARGS)

bench-followups: $(VENV)/.installed  ## Measure what follow-ups cost ingest and each other, and that none is lost (needs wrk)
	@$(BIN)/python -m tests.bench.followups $(BENCH_ARGS)

bench-export: $(VENV)/.installed  ## Measure the export of a million events, and its check
	@$(BIN)/python -m tests.bench.export $(BENCH_ARGS)

bench-analytics: $(VENV)/.installed  ## Measure thirty questions of analysts in two archives, in buffers and rows
	@$(BIN)/python -m tests.bench.analytics $(BENCH_ARGS)

bench-console: $(VENV)/.installed  ## Measure what the pages of the console read in two archives, in buffers
	@$(BIN)/python -m tests.bench.console $(BENCH_ARGS)

bench-long: $(VENV)/.installed  ## Measure a session of 2,000 turns whose history is read after each: cost, room, other sessions
	@$(BIN)/python -m tests.bench.long $(BENCH_ARGS)

soak: $(VENV)/.installed  ## Align 80,000 random conversations; three minutes of faults under load, then an audit (SOAK_ARGS="--seconds 60 --seed 7")
	@$(BIN)/python -m tests.bench.assignment
	@$(BIN)/python -m tests.bench.soak $(SOAK_ARGS)

schema: $(VENV)/.installed  ## Record a new migration: its digest
	@$(BIN)/python -m tests.landing

lock: $(VENV)/.installed  ## Renew requirements.lock and its part for production from pyproject.toml
	@$(PIP) 'uv==0.13.9'
	@$(LOCK) --extra parquet --extra oidc --group dev --output-file requirements.lock pyproject.toml
	@$(LOCK) --no-strip-extras --output-file deploy/analytics/requirements.lock deploy/analytics/requirements.in
	@$(LOCK) --group browser --constraints requirements.lock --output-file requirements-browser.lock pyproject.toml
	@$(LOCK) --group build --constraints requirements.lock --output-file requirements-runtime.lock pyproject.toml

clean:  ## Remove .venv and caches (never your data)
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
