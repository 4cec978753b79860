# `make demo` and `make test` set up .venv by themselves; the README shows the plain pip lines behind them.
PYTHON ?= python3

.PHONY: demo test lint
demo: .venv/installed
	.venv/bin/novelret demo

test: .venv/tests-installed
	.venv/bin/python -m pytest -n 4 --dist loadfile

lint: .venv/lint-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet -e . -c constraints.txt
	touch $@

.venv/tests-installed: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet -e ".[test]" -c constraints.txt
	touch $@

.venv/lint-installed: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet -e ".[lint]" -c constraints.txt
	touch $@
