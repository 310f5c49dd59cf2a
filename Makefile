PROMPT ?= Once upon a time there was a poor woodcutter
PYTHON ?= python3

.PHONY: demo test check

demo: .venv/installed
	@.venv/bin/python -m tools generate --prompt "$$PROMPT" --max-new-tokens 200 \
		--temperature 0.7 --top-p 0.95 --seed 4 --draft-tokens 1

test: .venv/installed-for-tests
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

check: .venv/installed-for-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-for-tests: .venv/installed
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[test,check]"
	touch $@

export PROMPT
