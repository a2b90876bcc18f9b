# Everything happens in a virtual environment of its own. On a machine with a GPU, pick the torch that fits
# its driver: make test TORCH="torch --index-url ...".
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# A warning ends the build here, not that of whoever installs with another compiler.
export TOKENDANCE_WERROR ?= 1

.PHONY: build test test-all test-gpu test-vllm soak demo bench measurements lint format typecheck docs wheel sanitize sanitize-gpu coverage \
  coverage-python coverage-cpp environments mutate coverage-ptx sass crash fuzz hooks clean

# Of two makes at once the second waits for the first one's environment, and for its build (setup.py).
$(VENV)/ready: pyproject.toml tools/ptxrun/pyproject.toml
ifndef ALONE
	@mkdir -p $(VENV) && flock $(VENV) $(MAKE) --no-print-directory ALONE=1 $@
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet "setuptools>=77" wheel cmake ninja pybind11 numpy
	$(BIN)/pip install --quiet --no-build-isolation -e tools/ptxrun -e ".[test,bench,dev,docs,transformers]"
	touch $@
endif

build: $(VENV)/ready
	$(BIN)/python setup.py --quiet build_ext --inplace

# What a change can break in minutes: lint, types, documentation, and the tests but for the slow ones, those that run a
# model, and most of those that execute PTX (tests/check_tiers.py). In two processes: most tests take one core.
test: build lint typecheck docs
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not rest" $(PYTEST_ARGS)

# All else, part by part. CHECKS="ptx_movement models": these parts; see tools/checks.py.
test-all: build
	$(BIN)/python -m tools.checks $(CHECKS)

# What needs a GPU, then a few cases under compute-sanitizer, without which this fails: GPU_ARGS=--without-sanitizer
# goes without. Nothing is installed: where there is no .venv, PYTHON has what is needed, torch and pytest.
HERE := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu:
	$(HERE) setup.py --quiet build_ext --inplace
	$(HERE) -m tools.gpu_tests $(GPU_ARGS)

sanitize-gpu:
	$(HERE) setup.py --quiet build_ext --inplace
	$(HERE) -m tools.gpu_tests sanitize $(GPU_ARGS)

# tokendance inside vLLM, in an environment of its own that is kept (3.4 GB). VLLM_ARGS="--environment DIR": in another
# one that has vLLM; --short: what CI runs; see tools/test_vllm.py.
test-vllm: build
	$(BIN)/python -m tools.test_vllm $(VLLM_ARGS)

# Threads, and the store as a state machine, for as long as one likes. SOAK_ARGS: see tests/soak.py.
soak: build
	$(BIN)/python tests/soak.py $(SOAK_ARGS)

demo: build
	$(BIN)/python -m evals simulate --audit --html build/demo.html
	@echo "The page about this run: build/demo.html"

# Every operator against what this machine can do, measured in the same run; bench/compare.py compares two.
bench: build
	$(BIN)/python -m pytest -q -c bench/pytest.ini bench --benchmark-json build/bench.json $(BENCH_ARGS)

# Runs what measures the tables of docs/, keeps its JSON and renders the tables: hours. MEASUREMENTS="smollm2_rows": some;
# see tools/measurements.py.
measurements: build
	$(BIN)/python -m tools.measurements $(MEASUREMENTS)

# Stores whose process is killed at random instants, then at every file operation, by the process's end, by errors
# and by the loss of power. CRASH_ARGS: see tests/kill_stores.py.
crash: build
	$(BIN)/python tests/kill_stores.py $(CRASH_ARGS)
	CRASH_SEEDS=10 $(BIN)/python -m pytest -q -n 0 tests/test_crash.py

# Damaged bytes of page files and catalogues: an hour on one core.
fuzz: build
	FUZZ_EXAMPLES=100000 $(BIN)/python -m pytest -q -n 0 tests/test_damage.py -k any_damage

# The CPU kernels and launch functions under AddressSanitizer + UBSan, and under ThreadSanitizer.
sanitize: $(VENV)/ready
	$(BIN)/python tests/cpp/run.py

# Which lines the tests reach: of Python, and of the C++ that runs without a GPU. Each fails below its
# target, which stands in pyproject.toml and in tests/cpp/coverage.py.
coverage: coverage-python coverage-cpp

# Without the tests that execute PTX or run a model, which reach no line of their own.
PTX_TESTS := cuda_attention cuda_launches cuda_traffic coverage mutants paths sass
coverage-python: build
	$(BIN)/python -m pytest -q -n 2 --backend cpu -m "not slow and not model" --cov \
	  $(PTX_TESTS:%=--ignore=tests/test_%.py) tests

coverage-cpp: $(VENV)/ready
	$(BIN)/python tests/cpp/coverage.py

# This build beside older torches and in other Pythons, in environments that are kept (4 to 5 GB each for
# PyPI's torches). ENVIRONMENTS="3.11:2.12.0 ...": others than those of tools/environments.py.
environments: build
	$(BIN)/python -m tools.environments $(ENVIRONMENTS)

# What the CUDA kernels' tests notice, what they do not reach, and what the assembler makes of the
# kernels: needs nvcc, no GPU. MUTATE_ARGS: see tools/mutate.py.
mutate: build
	$(BIN)/python -m tools.mutate --jobs $$(nproc) $(MUTATE_ARGS)

coverage-ptx: build
	$(BIN)/python -m tools.coverage

# SASS_ARGS: see tools/sass.py; without them, every architecture of a release.
sass: build
	$(BIN)/pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python -m tools.sass --jobs $$(nproc) $(SASS_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*' | grep -E '\.(h|cpp|cu|cuh)$$' \
	  | xargs $(BIN)/clang-format --dry-run --Werror

typecheck: $(VENV)/ready
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*' | grep -E '\.(h|cpp|cu|cuh)$$' \
	  | xargs $(BIN)/clang-format -i

# An sdist and, out of it, wheels with the CUDA kernels of a release, in dist/: for this Python and those of
# PYTHONS="python3.12 ...". Then this Python's is installed without a toolkit beside this torch (WHEEL_ARGS="--torch
# 'torch ...'": another one).
wheel: $(VENV)/ready
	TOKENDANCE_CUDA_ARCHS="80;86;89;90;100;120" $(BIN)/python -m build --no-isolation
	$(BIN)/python -m tools.wheels $(PYTHONS)
	$(BIN)/python -m tools.check_wheel $(WHEEL_ARGS)

# The site in build/site. A dead link is an error.
docs: $(VENV)/ready
	$(BIN)/mkdocs build --quiet

# Before each commit lint, types and documentation; of each message its form.
hooks: $(VENV)/ready
	$(BIN)/pre-commit install
	install -m 755 tools/hooks/commit-msg "$$(git rev-parse --git-path hooks/commit-msg)"

clean:
	rm -rf build dist *.egg-info tokendance/*.so
