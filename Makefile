# Each target makes what it needs, in .venv. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

.PHONY: help demo test install lint core pytest gpu-test bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

demo: $(VENV)/installed  ## install, and fine-tune a tiny model that ships with zo2ext
	rm -rf runs/demo
	$(BIN)/zo2ext demo --out runs/demo

test: lint core pytest  ## install, and run every check: lint, C++ (CUDA too where nvcc is), Python

install: $(VENV)/installed  ## build zo2ext into .venv

lint: $(VENV)/installed  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

core: $(VENV)/installed  ## the torch-free core alone, and its C++ checks
	$(BIN)/cmake -S . -B build/core -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/core -j $(JOBS)
	$(BIN)/ctest --test-dir build/core --output-on-failure

pytest: $(VENV)/installed  ## the Python tests
	$(BIN)/pytest

gpu-test: $(VENV)/installed  ## the tests that need a GPU
	$(BIN)/pytest -m gpu

bench: $(VENV)/installed  ## kernels and steps, measured on this machine
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/step.py

clean:  ## remove everything made here
	rm -rf $(VENV) build dist *.egg-info zo2ext/ops/_C*.so runs

# torch is installed first: the extension is built against it, and pip must not pick another.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch numpy 'setuptools>=77' wheel ninja
	ZO2EXT_WERROR=1 MAX_JOBS=$(JOBS) $(BIN)/pip install --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@
