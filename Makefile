# `make demo` and `make test` need Python >= 3.10, a C++ compiler and make. They use the active virtual environment
# when it has a torch, else .venv, which they create. Another torch: make TORCH=torch==2.11.0 test

PYTHON ?= python3
TORCH ?= torch==2.13.0

ACTIVE := $(if $(VIRTUAL_ENV),$(shell "$(VIRTUAL_ENV)/bin/python" -c "import torch" 2>/dev/null && echo yes))
VENV := $(if $(ACTIVE),$(VIRTUAL_ENV),$(CURDIR)/.venv)
PY := $(VENV)/bin/python
STAMPS := build/stamps/$(subst /,_,$(patsubst $(CURDIR)/%,%,$(VENV)))
SOURCES := setup.py build_config.py pyproject.toml $(shell find csrc -type f)
JOBS ?= 2
export PATH := $(VENV)/bin:$(PATH)

.PHONY: help build demo test bench figures lint format asan cudabuild sanitize card sdist clean FORCE
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

demo: build ## environment, self-test, LeNet-5 trained on handwritten digits, pictures in out/
	$(PY) -m cuda_cnn env
	$(PY) -m cuda_cnn demo

test: build ## the whole test suite
	$(PY) -m pytest -n $(JOBS) $(ARGS)

bench: build ## every kernel against torch's vendor library
	$(PY) -m pytest benchmarks --benchmark-enable $(ARGS)

RESULTS ?= benchmarks/results/amd-epyc-avx512_bf16-2-threads
figures: build ## README's table of speeds, docs/measured.md and its figures, from benchmarks/results/
	$(PY) -m cuda_cnn bench --readme $(RESULTS)

build: $(STAMPS)/build ## the extension, in place

# ---- Environment --------------------------------------------------------------------------------------------

$(CURDIR)/.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cuda_cnn needs Python 3.10 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; rm -rf .venv; exit 1; }

# Rewritten only when TORCH is another than last time.
$(STAMPS)/torch: FORCE
	@mkdir -p $(@D)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

$(STAMPS)/requirements: $(VENV)/pyvenv.cfg requirements.txt pyproject.toml $(if $(ACTIVE),,$(STAMPS)/torch)
	@mkdir -p $(@D)
ifdef ACTIVE
	$(PY) -m pip install -q "setuptools>=77" wheel ninja numpy \
	  matplotlib pillow rich safetensors scikit-learn tensorboard tqdm \
	  expecttest hypothesis onnx onnxscript pytest pytest-benchmark pytest-xdist
else
	$(PY) -m pip install -q "$(TORCH)" -r requirements.txt
endif
	@touch $@

$(STAMPS)/build: $(STAMPS)/requirements $(SOURCES)
	$(PY) -m pip install -v --no-build-isolation --no-deps -e . > build/build.log 2>&1 \
	  || { grep -v "^ *\[[0-9]*/[0-9]*\]" build/build.log | tail -n 60; exit 1; }
	@sed -n 's/^ *\(cuda_cnn: .*\)/\1/p' build/build.log | sort -u
	@touch $@

$(STAMPS)/dev: $(STAMPS)/requirements requirements-dev.txt
	$(PY) -m pip install -q -r requirements-dev.txt
	@touch $@

# ---- Looking after the code ---------------------------------------------------------------------------------

CXX_FILES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

lint: $(STAMPS)/dev ## ruff and clang-format, changing nothing
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMPS)/dev ## ruff and clang-format
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

asan: build ## the operators' tests over kernels built with AddressSanitizer and UBSan
	PYTHON=$(PY) .ci/steps/50-asan $(ARGS)

cudabuild: build ## the complete extension against the CUDA build of torch, and its CPU tests: needs nvcc, no GPU
	PYTHON=$(PY) .ci/steps/10-cuda-build $(ARGS)

sanitize: build ## the operators' tests under compute-sanitizer's memcheck and racecheck: needs a GPU
	PYTHON=$(PY) .ci/card sanitize $(ARGS)

card: ## all that a GPU has to show, in order: .ci/card says which parts there are
	PYTHON=$(PY) .ci/card $(ARGS)

sdist: $(STAMPS)/dev ## the source distribution, in dist/
	$(PY) setup.py -q sdist

clean: ## everything built, not .venv
	rm -rf build dist *.egg-info cuda_cnn/_C*.so cuda_cnn/_build_info.*.json
