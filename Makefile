PYTHON ?= python3
ARGS   ?=
JOBS   ?= 2
PIP_OPTIONS ?=

RUN  := .venv
TEST := .venv-test
OLDEST := .venv-oldest
CORE := .venv-core
PEERS := .peers
SPREAD = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run peers figures test oldest core check docs format clean

help:
	@echo 'make run      run the benchmark and print its tables (ARGS="..." goes to fusedrnn bench)'
	@echo 'make peers    install the libraries that benchmarks.compare times (ARGS="jax keras" for some)'
	@echo 'make figures  draw a benchmark (ARGS="rows.json FOLDER", rows.json from fusedrnn bench --json)'
	@echo 'make test     run the tests, files in two processes (ARGS="..." goes to pytest, JOBS=0 for one)'
	@echo 'make oldest   run the tests of JAX, Keras and ONNX with the oldest releases that the extras allow'
	@echo 'make core     run the tests of the operator, which need neither PyTorch nor JAX; for other interpreters'
	@echo 'make check    lint and check types'
	@echo 'make docs     build the documentation into build/site, warnings as errors'
	@echo 'make format   sort imports and fix what the linter can fix'
	@echo 'make clean    remove the virtual environments, caches and builds'
	@echo 'PYTHON=python3.11 chooses the interpreter, 3.10 or newer'

run: $(RUN)/.installed-bench
	$(RUN)/bin/fusedrnn bench $(ARGS)

peers: $(RUN)/.installed-bench
	$(RUN)/bin/python -m benchmarks.peers $(ARGS)

figures: $(RUN)/.installed-figures
	$(RUN)/bin/python -m benchmarks.figures $(ARGS)

test: $(TEST)/.installed-test
	$(TEST)/bin/python -m pytest $(SPREAD) $(ARGS)

# Layers for flax need a newer JAX.
oldest: $(OLDEST)/.installed-test
	$(OLDEST)/bin/python -m pytest $(SPREAD) --ignore tests/jax/test_nnx.py \
		tests/jax tests/keras tests/onnx $(ARGS)

# What a Python for which PyTorch has no build can run, such as the oldest one.
core: $(CORE)/.installed-test
	$(CORE)/bin/python -m pytest $(SPREAD) \
		tests/cell/test_expr.py tests/cell/test_language.py tests/jit tests/op tests/runtime $(ARGS)

check: $(TEST)/.installed-dev
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports --no-cache

docs: $(TEST)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/mkdocs build --strict

format: $(TEST)/.installed-dev
	$(TEST)/bin/ruff check --fix .

clean:
	rm -rf $(RUN) $(TEST) $(OLDEST) $(CORE) $(PEERS) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

comma := ,

# $(call install,environment,extras,constraints,packages): the editable package with extras, and other packages.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "error: fusedrnn needs Python 3.10 or newer, and '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>/dev/null || echo 'not a Python that runs')." \
			"Choose another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'Installing fusedrnn[$(2)] into $(1)'
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_OPTIONS) \
		-c $(or $(3),constraints.txt) -e '.[$(2)]' $(4)
endef

$(RUN)/.installed-bench: pyproject.toml constraints.txt
	$(call install,$(RUN),bench)
	@touch $@

# figures includes bench, so one install serves both.
$(RUN)/.installed-figures: pyproject.toml constraints.txt
	$(call install,$(RUN),figures)
	@touch $@ $(RUN)/.installed-bench

$(TEST)/.installed-test: pyproject.toml constraints.txt
	$(call install,$(TEST),test)
	@touch $@

# dev includes test, so one install serves both.
$(TEST)/.installed-dev: pyproject.toml constraints.txt
	$(call install,$(TEST),dev)
	@touch $@ $(TEST)/.installed-test

$(OLDEST)/.installed-test: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),bench$(comma)equinox$(comma)keras$(comma)onnxruntime$(comma)torch,constraints-oldest.txt,\
		hypothesis ml_dtypes onnxscript pytest pytest-timeout pytest-xdist)
	@touch $@

$(CORE)/.installed-test: pyproject.toml constraints.txt
	$(call install,$(CORE),bench$(comma)onnx,,hypothesis jinja2 ml_dtypes pytest pytest-timeout pytest-xdist)
	@touch $@
