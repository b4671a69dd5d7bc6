# Each target makes what it needs, in .venv. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
PINS   ?= -c constraints.txt
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

SOURCES := pyproject.toml setup.py constraints.txt \
  $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

.PHONY: help demo test quick install lint core pytest package docs gpu-test test-latest bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: $(VENV)/installed  ## install, and fine-tune a tiny model that ships with zo2ext
	rm -rf runs/demo
	$(BIN)/zo2ext demo --out runs/demo

test: lint core pytest package  ## install, and run every check: lint, C++, Python, packages

quick: lint $(VENV)/dev  ## lint and the fast tests: under two minutes
	$(BIN)/pytest -q -n $(JOBS) -m "not slow and not ranks and not gpu"

install: $(VENV)/dev  ## build zo2ext into .venv, with everything that its checks need

lint: $(VENV)/dev  ## ruff, mypy, clang-format, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

core: $(VENV)/dev  ## the torch-free core alone, and its C++ checks
	$(BIN)/cmake -S . -B build/core -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/core -j $(JOBS)
	$(BIN)/ctest --test-dir build/core -j $(JOBS) --output-on-failure

pytest: $(VENV)/dev  ## the Python tests
	$(BIN)/pytest -n $(JOBS)

# The wheel is made from the sdist, and for CPUs only: `make core` compiles the CUDA sources.
package: $(VENV)/dev  ## sdist and wheel, and a run of what the wheel contains
	rm -rf build/package && mkdir -p build/package
	ZO2EXT_CUDA=0 MAX_JOBS=$(JOBS) $(BIN)/python -m build --no-isolation --outdir build/package . \
	  > build/package.log 2>&1 || { cat build/package.log; exit 1; }
	tar -tzf build/package/*.tar.gz | sed 's,^[^/]*/,,' | sort > build/package/files
	! git ls-files csrc/bindings csrc/cpu csrc/cuda | sort | comm -23 - build/package/files | grep .
	$(PIP) --no-deps --target build/package/wheel build/package/*.whl
	cd build/package && PYTHONPATH=wheel $(abspath $(BIN))/python -c \
	  "import zo2ext; from zo2ext.commands.main import main; \
	  assert 'build/package/wheel' in zo2ext.__file__, zo2ext.__file__; \
	  raise SystemExit(main(['check', 'wheel/zo2ext/demo/model']))"

docs: $(VENV)/docs  ## the documentation as a site, in build/site
	$(BIN)/mkdocs build --strict --site-dir build/site

gpu-test: $(VENV)/dev  ## the tests that need a GPU
	$(BIN)/pytest -m gpu

# In a copy, so that the extension that is built for the newest torch does not replace this one's.
test-latest:  ## the Python tests with the newest versions of everything, in .venv-latest
	rm -rf build/latest && mkdir -p build/latest
	git ls-files -z | xargs -0 tar c | tar x -C build/latest
	$(MAKE) -C build/latest pytest VENV=$(abspath .venv-latest) \
	  PINS="--upgrade --upgrade-strategy eager"

bench: $(VENV)/dev  ## kernels and steps, measured on this machine
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/step.py

clean:  ## remove everything made here
	rm -rf $(VENV) .venv-latest build dist *.egg-info zo2ext/ops/_C*.so runs

# torch is installed first: the extension is built against it, and pip must not pick another.
define prepare
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(PINS) torch numpy 'setuptools>=77' wheel ninja
	@echo "building zo2ext: this takes minutes"
endef

$(VENV)/installed: $(SOURCES)
	$(prepare)
	MAX_JOBS=$(JOBS) $(PIP) --no-build-isolation $(PINS) -e '.[plot]'
	touch $@

$(VENV)/dev: $(SOURCES)
	$(prepare)
	ZO2EXT_WERROR=1 MAX_JOBS=$(JOBS) $(PIP) --no-build-isolation $(PINS) -e '.[dev]'
	touch $(VENV)/installed $@

$(VENV)/docs: $(VENV)/dev
	$(PIP) $(PINS) $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@
