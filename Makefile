# Everything happens in a virtual environment of its own. On a machine with a GPU, pick the torch that fits
# its driver: make test TORCH="torch --index-url ...".
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# A warning ends the build here, not that of whoever installs with another compiler.
export TOKENDANCE_WERROR ?= 1

.PHONY: build test test-gpu test-vllm demo bench lint format typecheck docs wheel sanitize sanitize-gpu coverage \
  coverage-python coverage-cpp mutate coverage-ptx sass clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet "setuptools>=77" wheel cmake ninja pybind11 numpy
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test,bench,dev,docs,transformers]"
	touch $@

build: $(VENV)/ready
	$(BIN)/python setup.py --quiet build_ext --inplace

# In two processes: most tests take one core.
test: build
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

# The operators on the GPU of this machine, then a few of their cases under compute-sanitizer.
test-gpu: build
	$(BIN)/python -m pytest -q --backend cuda $(PYTEST_ARGS)
	$(MAKE) sanitize-gpu

# Every access in bounds (memory is not pooled, so that bounds are those of tensors), no races in
# shared memory, all threads at every barrier.
SANITIZER := compute-sanitizer --target-processes all --error-exitcode 1 \
  --kernel-name kernel_substring=tokendance
SANITIZED := $(BIN)/python -m pytest -q --backend cuda tests/test_gpu.py -k compact_cases
sanitize-gpu: build
	@if ! command -v compute-sanitizer > /dev/null; then \
	  echo "Not sanitized: compute-sanitizer is not on PATH; it comes with the CUDA toolkit."; \
	else \
	  set -ex; export PYTORCH_NO_CUDA_MEMORY_CACHING=1; \
	  $(SANITIZER) --tool memcheck --report-api-errors no $(SANITIZED); \
	  $(SANITIZER) --tool racecheck $(SANITIZED); \
	  $(SANITIZER) --tool synccheck $(SANITIZED); \
	fi

# tokendance inside vLLM, in an environment of its own (3.4 GB). VLLM_ARGS: see tools/test_vllm.py.
test-vllm: build
	$(BIN)/python -m tools.test_vllm $(VLLM_ARGS)

demo: build
	$(BIN)/python -m evals simulate --audit --html build/demo.html
	@echo "The page about this run: build/demo.html"

# Every operator against what this machine can do, measured in the same run; bench/compare.py compares two.
bench: build
	$(BIN)/python -m pytest -q -c bench/pytest.ini bench --benchmark-json build/bench.json $(BENCH_ARGS)

# The CPU kernels and launch functions under AddressSanitizer + UBSan, and under ThreadSanitizer.
sanitize: $(VENV)/ready
	$(BIN)/python tests/cpp/run.py

# Which lines the tests reach: of Python, and of the C++ that runs without a GPU. Each fails below its
# target, which stands in pyproject.toml and in tests/cpp/coverage.py.
coverage: coverage-python coverage-cpp

# Without the tests that execute PTX or run a model, which reach no line of their own.
PTX_TESTS := cuda_attention cuda_launches cuda_traffic coverage mutants sass
coverage-python: build
	$(BIN)/python -m pytest -q -n 2 --backend cpu -m "not slow and not model" --cov \
	  $(PTX_TESTS:%=--ignore=tests/test_%.py) tests

coverage-cpp: $(VENV)/ready
	$(BIN)/python tests/cpp/coverage.py

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

clean:
	rm -rf build dist *.egg-info tokendance/*.so
