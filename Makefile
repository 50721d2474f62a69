# `make help` lists the targets and the variables.
#
# The package is installed editable: Python changes need nothing, and a change of csrc/, setup.py or pyproject.toml makes the next target
# recompile what it touches and install again. Stamps live in the environment they describe, so that a new environment starts without them.

PYTHON ?= python3
TORCH ?= 2.13.0
BUDGET ?= 300
TRAIN_SECONDS ?= 240
VENV ?= $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)

bin := $(VENV)/bin
stamp := $(VENV)/.mfac_kernels
pip := $(bin)/python -m pip --quiet --disable-pip-version-check
sources := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install demo test bench record bench-compare paper-fig1 paper-pruning paper-twolevel paper-relatives paper-gptq paper-pinn gpt2 lint sanitized-build sanitize fuzz simt cuda-check cuda-audit cuda-wheel gpu wheel abi-check wheels docs clean

help:
	@echo 'make demo      build, then train on CIFAR-10 with SGD, Adam, M-FAC and K-FAC: runs/demo'
	@echo 'make test      build, then run the tests'
	@echo 'make bench     build, then run the benchmarks; RECORD=dir: results.json and results.md there, by family'
	@echo 'make record    the same beside all peers, and growth, accuracy, calls, steps, pruning: benchmarks/results/cpu as this machine has it'
	@echo 'make bench-compare OLD=file NEW=file  what moved between two such results.json'
	@echo 'make paper-fig1  SGD and four kinds of K-FAC on CIFAR-10: benchmarks/results/fig1.*'
	@echo 'make paper-twolevel  K-FAC and its coarse corrections on four problems: benchmarks/results/twolevel.*'
	@echo 'make paper-relatives  K-FAC beside its relatives, Adam and SGD on two problems: benchmarks/results/relatives.*'
	@echo 'make paper-pruning  ResNet-20 on CIFAR-10 pruned to 50-95%: benchmarks/results/pruning_trained; CHECKPOINT=file: that network, results/pruning.*'
	@echo 'make paper-gptq  a small transformer, quantised and pruned on layer Hessians: benchmarks/results/quantised_transformer.*'
	@echo 'make paper-pinn  K-FAC, ENGD and others on four equations, 30 minutes: benchmarks/results/pinn.*'
	@echo 'make gpt2      K-FAC beside SGD on a GPT-2 of the transformers library: benchmarks/results/gpt2_kfac.*'
	@echo 'make lint      ruff, mypy, clang-format'
	@echo 'make sanitize  the op tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make fuzz      random calls of all that is public under the sanitizers, for FUZZ_SECONDS=1800'
	@echo 'make simt      the op tests on the CUDA kernels, run on the CPU in three orders of threads'
	@echo 'make cuda-check  every CUDA kernel compiled for the default architectures; registers, shared memory, spills'
	@echo 'make cuda-audit  what bounds the kernels that cuda-check compiled, from their machine code; fails if loads get narrower'
	@echo 'make cuda-wheel  a wheel for CUDA in dist/cuda, built, imported and fake-run; needs no GPU'
	@echo 'make gpu       tests, sanitizers and benchmarks on a GPU, in RESULTS=runs/gpu, with $$(PYTHON) and what it has; QUICK=1: a part, in 3 minutes; DRY=1: on the CPU'
	@echo 'make wheel     a manylinux wheel in dist/'
	@echo 'make abi-check  that wheel on torch 2.10, 2.11 and 2.13, each in an environment of its own: gigabytes; TORCHES="2.12.1": on these'
	@echo 'make wheels    such a wheel for each of PYTHONS="python3.10 python3.14", each run on TORCH, in dist/'
	@echo 'make docs      the documentation site: build/docs/index.html'
	@echo 'make install   the build alone'
	@echo 'make clean     remove what was built (not the environment)'
	@echo
	@echo 'PYTHON=python3      the interpreter that makes the environment'
	@echo 'VENV=.venv          the environment; one that is active is used in its place'
	@echo 'TORCH=2.13.0        the version of torch to install; without TORCH= a torch that is there stays'
	@echo 'BUDGET=300          seconds that the demo trains for'
	@echo 'TRAIN_SECONDS=240   seconds that paper-gptq trains for'

# ---- environment ----------------------------------------------------------------------------------------------------------------

$(bin)/python:
	$(PYTHON) -m venv $(VENV)

# A torch asked for by name replaces what is there; the pinned one only fills a gap.
ifeq ($(origin TORCH),file)
torch_stamp := $(stamp)-torch
torch_missing := ! $(bin)/python -c 'import torch' 2>/dev/null
else
torch_stamp := $(stamp)-torch-$(TORCH)
torch_missing := true
endif

$(torch_stamp): | $(bin)/python
	if $(torch_missing); then $(pip) install 'torch==$(TORCH)'; fi
	$(pip) install 'pip>=22' 'setuptools>=77' ninja 'pybind11>=3.0' numpy
	rm -f $(stamp)-torch*
	touch $@

$(stamp): $(torch_stamp) $(sources)
	$(pip) install --no-build-isolation --editable .
	touch $@

# The package is there already, so its name brings in what the extra asks for and nothing else.
$(stamp)-%: pyproject.toml | $(stamp)
	$(pip) install 'mfac_kernels[$*]'
	touch $@

# A wheel is built apart from the checkout, so that its tools need no package there and its binaries stay as they are.
$(stamp)-dist: pyproject.toml | $(torch_stamp)
	$(pip) install 'pip>=25.1'
	$(pip) install --group dist
	touch $@

# Other libraries, to compare with.
$(stamp)-peers: tests/peers.txt | $(stamp)-test
	$(pip) install --no-deps --requirement tests/peers.txt
	touch $@

install: $(stamp)

# ---- use ------------------------------------------------------------------------------------------------------------------------

demo: $(stamp) $(stamp)-demo
	$(bin)/mfac-kernels train --data cifar10 --fallback --optimizers sgd,adam,mfac,kfac --budget $(BUDGET) --out runs/demo

test: $(stamp) $(stamp)-test $(stamp)-peers
	$(bin)/pytest

bench: $(stamp) $(stamp)-test
	$(bin)/pytest benchmarks $(if $(RECORD),--record $(RECORD))

record: results := benchmarks/results/cpu
record: $(stamp) $(stamp)-bench $(stamp)-peers
	$(bin)/pytest benchmarks --record $(results)
	for program in growth kronecker_accuracy calls kfac_step; do $(bin)/python benchmarks/$$program.py $(results) || exit; done
	for program in kronecker_layers pruning_cost; do $(bin)/python benchmarks/$$program.py --out $(results) || exit; done
	$(bin)/python benchmarks/cholesky_real_factors.py --out $(results)/cholesky_real_factors.md
	$(bin)/python benchmarks/bench_layer_hessians.py --out $(results)/layer_hessians

bench-compare:
	$(PYTHON) benchmarks/compare.py $(OLD) $(NEW)

paper-fig1: $(stamp) $(stamp)-demo
	$(bin)/python benchmarks/paper_fig1.py

paper-twolevel: $(stamp) $(stamp)-demo
	OMP_NUM_THREADS=1 $(bin)/python benchmarks/paper_twolevel.py

paper-relatives: $(stamp) $(stamp)-demo
	OMP_NUM_THREADS=1 $(bin)/python benchmarks/paper_relatives.py

paper-pruning: $(stamp) $(stamp)-demo
	$(bin)/python benchmarks/paper_pruning.py $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT),--out benchmarks/results/pruning_trained)

paper-gptq: $(stamp)
	$(bin)/python benchmarks/quantised_transformer.py --train-seconds $(TRAIN_SECONDS)

paper-pinn: $(stamp) $(stamp)-demo
	OMP_NUM_THREADS=1 $(bin)/python benchmarks/paper_pinn.py

gpt2: $(stamp) $(stamp)-bench
	$(bin)/python benchmarks/gpt2_kfac.py

# ---- checks ---------------------------------------------------------------------------------------------------------------------

lint: $(stamp) $(stamp)-lint
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy --strict mfac_kernels
	$(bin)/clang-format --dry-run --Werror $(filter csrc/%,$(sources))

# The interpreter is not an instrumented program: the sanitizer's run time has to be there before it starts (and libstdc++, whose throw it
# wraps), and what CPython and torch keep until they exit counts as leaked, so leaks are not looked for. Memory that there is not is an error
# of torch's.
sanitized := LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so) \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=$(CURDIR)/build/sanitize/lib

sanitized-build: $(stamp) $(stamp)-test
	rm -rf build/sanitize/lib
	MFAC_KERNELS_SANITIZE=1 MFAC_KERNELS_CUDA=0 \
	  $(bin)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	cd build/sanitize/lib && $(sanitized) \
	  $(bin)/python -c 'import mfac_kernels; assert mfac_kernels.build_info()["sanitized"]'

sanitize: sanitized-build
	$(sanitized) $(bin)/pytest tests/ops

FUZZ_SECONDS ?= 1800
fuzz: sanitized-build
	$(sanitized) $(bin)/python tools/fuzz.py --seconds $(FUZZ_SECONDS)

simt: $(stamp) $(stamp)-test
	rm -rf build/simt/lib
	MFAC_KERNELS_SIMT=1 $(bin)/python setup.py --quiet build --build-base build/simt --build-lib build/simt/lib
	cd build/simt/lib && PYTHONPATH=$$PWD $(bin)/python -c 'import mfac_kernels; assert mfac_kernels.build_info()["simt"]'
	for order in forward reverse random; do \
	  MFAC_KERNELS_SIMT_ORDER=$$order PYTHONPATH=$(CURDIR)/build/simt/lib $(bin)/pytest tests/ops || exit; done

# Needs nvcc, no GPU and no torch with CUDA: kernels know no torch, and their glue only the headers that every torch has.
NVCC ?= nvcc
architectures := 80 90 100 120
torch_includes = $(shell $(bin)/python -c 'from torch.utils.cpp_extension import include_paths; print(*include_paths("cpu"))')

cuda-check: $(stamp)
	mkdir -p build/cuda-check
	for kernels in $(wildcard csrc/*/cuda/*.cu); do \
	  $(NVCC) -std=c++20 -O3 -Icsrc -Werror all-warnings -Xptxas -v -c $$kernels -o build/cuda-check/$$(echo $$kernels | tr / .).o \
	    $(foreach a,$(architectures),-gencode arch=compute_$(a),code=sm_$(a)) || exit; \
	done >build/cuda-check/log 2>&1 || { cat build/cuda-check/log; exit 1; }
	for glue in $(wildcard csrc/*/cuda/*.cpp); do \
	  $(NVCC) -std=c++20 -Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-Wno-psabi,-Werror -DUSE_CUDA -DTORCH_STABLE_ONLY \
	    -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc $(addprefix -isystem ,$(torch_includes)) \
	    -c $$glue -o build/cuda-check/$$(echo $$glue | tr / .).o || exit; done
	$(bin)/python tools/cuda_resources.py <build/cuda-check/log

# Of what cuda-check left: it compiles, this reads.
cuda-audit: $(stamp) $(stamp)-audit
	$(bin)/python tools/cuda_audit.py build/cuda-check benchmarks/results/cuda_audit.md

cuda-wheel: $(stamp)
	$(bin)/python tools/cuda_wheel.py --torch 'torch===$(TORCH)'

# No network, so no environment of its own.
RESULTS ?= runs/gpu
gpu:
	$(PYTHON) tools/gpu.py $(RESULTS) $(if $(QUICK),--quick) $(if $(DRY),--dry-run)

# build/lib* would carry files into the wheel that the tree no longer has.
# For every distribution of its libc or a later one; the libraries of torch and of CUDA are those of the torch it meets.
wheel: $(torch_stamp) $(stamp)-dist
	rm -rf dist build/lib* build/wheel
	$(pip) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH=$(bin):$$PATH $(bin)/auditwheel repair --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' \
	  --exclude 'libcudart*' build/wheel/*.whl
	$(bin)/twine check --strict dist/*.whl

abi-check: wheel
	$(bin)/python tools/abi_check.py dist/*.whl $(if $(TORCHES),--torch $(TORCHES))

# One environment after the other, as each has a torch. After a failure the last one is there to look at.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
wheels:
	rm -rf build/wheels
	for python in $(PYTHONS); do \
	  rm -rf build/wheels/env; \
	  $(MAKE) abi-check PYTHON=$$python VENV=$(CURDIR)/build/wheels/env TORCHES=$(TORCH) || exit; \
	  mv dist/*.whl build/wheels || exit; done
	rm -rf build/wheels/env
	mv build/wheels/*.whl dist

docs: $(stamp) $(stamp)-docs
	$(bin)/sphinx-build -q -W --keep-going docs build/docs

clean:
	rm -rf build dist *.egg-info mfac_kernels/*.so $(stamp) $(stamp)-*
