PYTHON ?= python3
ARGS   ?=
JOBS   ?= 2

RUN  := .venv
TEST := .venv-test
PEERS := .peers

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run peers test check docs format clean

help:
	@echo 'make run      measure: print the benchmark tables (ARGS="..." goes to fusedrnn bench)'
	@echo 'make peers    build what fusedrnn bench --peers compares with (ARGS="jax keras" for some)'
	@echo 'make test     run the tests, files in two processes (ARGS="..." goes to pytest, JOBS=0 for one)'
	@echo 'make check    lint and check types'
	@echo 'make docs     build the documentation into build/site, warnings as errors'
	@echo 'make format   sort imports and mend what the linter can mend'
	@echo 'make clean    remove the virtual environments, caches and builds'
	@echo 'PYTHON=python3.11 chooses the interpreter, 3.10 or newer'

run: $(RUN)/.installed-bench
	$(RUN)/bin/fusedrnn bench $(ARGS)

peers: $(RUN)/.installed-bench
	$(RUN)/bin/python -m fusedrnn.bench.peers $(ARGS)

test: $(TEST)/.installed-test
	$(TEST)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(TEST)/.installed-dev
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports --no-cache

docs: $(TEST)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/mkdocs build --strict

format: $(TEST)/.installed-dev
	$(TEST)/bin/ruff check --fix .

clean:
	rm -rf $(RUN) $(TEST) $(PEERS) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# $(call install,environment,extra): the editable package and one extra, under the constraints.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "error: fusedrnn needs Python 3.10 or newer, and '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>/dev/null || echo 'not a Python that runs')." \
			"Choose another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'Installing fusedrnn[$(2)] into $(1)'
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(2)]'
endef

$(RUN)/.installed-bench: pyproject.toml constraints.txt
	$(call install,$(RUN),bench)
	@touch $@

$(TEST)/.installed-test: pyproject.toml constraints.txt
	$(call install,$(TEST),test)
	@touch $@

# dev includes test, so one install serves both.
$(TEST)/.installed-dev: pyproject.toml constraints.txt
	$(call install,$(TEST),dev)
	@touch $@ $(TEST)/.installed-test
