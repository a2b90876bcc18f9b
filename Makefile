# Everything happens in a virtual environment of its own. On a machine with a GPU, pick the torch that fits
# its driver: make test TORCH="torch --index-url ...".
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: build test demo bench lint format typecheck sanitize mutate coverage-ptx sass clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet "setuptools>=68" wheel cmake ninja pybind11 numpy
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test,dev,transformers]"
	touch $@

build: $(VENV)/ready
	$(BIN)/python setup.py --quiet build_ext --inplace

test: build
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

demo: build
	$(BIN)/python -m tokendance simulate --audit --html build/demo.html
	@echo "The page about this run: build/demo.html"

# Every operator against what this machine can do, measured in the same run; bench/compare.py compares two.
bench: build
	$(BIN)/python -m pytest -q -c bench/pytest.ini bench --benchmark-json build/bench.json $(BENCH_ARGS)

# The CPU kernels and launch functions under AddressSanitizer + UBSan, and under ThreadSanitizer.
sanitize: $(VENV)/ready
	$(BIN)/python tests/cpp/run.py

# What the CUDA kernels' tests notice, what they do not reach, and what the assembler makes of the
# kernels: needs nvcc, no GPU. MUTATE_ARGS: see tools/mutate.py.
mutate: build
	$(BIN)/python -m tools.mutate --jobs $$(nproc) $(MUTATE_ARGS)

coverage-ptx: build
	$(BIN)/python -m tools.coverage

sass: build
	$(BIN)/pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python -m tools.sass --jobs $$(nproc)

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

clean:
	rm -rf build dist *.egg-info tokendance/*.so
