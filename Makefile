# Every target sets up .venv if needed; a second run starts at once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed
# The Triton version of tests/triton_kernels.csv, or the newest one for an older Python, unless torch has installed its
# own, as it does for NVIDIA GPUs.
TRITON = $(shell $(BIN)/python -c 'import triton' 2>/dev/null || echo "\"triton>=3.4,<=3.9.0; sys_platform == 'linux'\"")
# All that compiling needs; with --jobs=2 the rest is installed at the same time.
TORCH_INSTALLED := .venv/.torch

LIBRARY := glow_kernels/_C.so

ifeq ($(origin CXX),default)
# g++ under that name: torch.compile does not recognise it as c++, and then compiles without precompiled headers, which
# takes twice as long.
CXX := $(shell command -v g++ || command -v c++ || command -v clang++)
endif
export CXX
# Some containers set it; every process of the tests would then compile all Python sources again.
unexport PYTHONDONTWRITEBYTECODE
# Without a compiler, demo and tests run on the reference backend.
NATIVE := $(if $(shell command -v $(firstword $(CXX)) 2>/dev/null),$(LIBRARY),no-compiler)

# A process per core with one thread each: two processes of several threads wait for each other most of the time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
# Every operator has a file of its name in the reference backend.
OPERATOR_TESTS := $(patsubst glow_kernels/backends/reference/%,tests/test_%,$(wildcard glow_kernels/backends/reference/[!_]*.py))
NATIVE_SOURCES := 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cuda_host/*.h' 'tests/cuda_host/*.cpp'
# Tests that other targets run.
ELSEWHERE := $(addprefix tests/test_,triton_compile.py cuda_compile.py cuda_host.py)
# The native library with every memory access and arithmetic operation checked. Only one variant of the kernels would
# run here, so the baseline is compiled for this processor. The checks that are switched off take a quarter of the
# compile time, and find pointers that AddressSanitizer finds when they are dereferenced.
SANITIZED := build/sanitized
SANITIZE := -g1 -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow \
	-fno-sanitize-recover=all -fno-omit-frame-pointer
# Tests of the Python layer over the kernels, whose memory accesses other tests cover.
OF_PYTHON := opcheck compile gradcheck torch_func meta_tensors autocast ranks
OF_KERNELS := "native $(addprefix and not ,$(OF_PYTHON))"

PYTEST_SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(1) OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto \
	-k $(OF_KERNELS)
# The CUDA sources as C++ on the CPU, with the same checks. Operators with separate kernels for small tensors are tested
# a second time with the kernels for large ones, since nearly all tensors of the tests are small.
CUDA_HOST := build/cuda_host
OF_ANY_SIZE := $(addprefix tests/test_,actnorm_conv1x1.py affine_coupling.py coupling_conv1x1.py)

.PHONY: help build build-cuda demo test test-triton test-variants test-sanitized test-cuda test-cuda-host bench gpu gpu-curve kernels-report lint format clean no-compiler

help:
	@echo "make build   compile the native CPU library, which needs a C++ compiler; CXX=clang++ chooses another"
	@echo "make build-cuda  compile the native CUDA library, which needs nvcc but no GPU; GLOW_KERNELS_CUDA_ARCHS=90 for one GPU"
	@echo "make demo    train a Glow on scikit-learn's digits, one to three minutes on two cores; pictures in runs/demo"
	@echo "make test    run the tests"
	@echo "make test-triton     run the operator tests on Triton's interpreter and compile its kernels for five GPUs"
	@echo "make test-variants   run the operator tests on the native kernels for processors without AVX-512, and without AVX2"
	@echo "make test-sanitized  run the operator tests on a native library with AddressSanitizer and UBSan"
	@echo "make test-cuda   compile the CUDA kernels and see that nothing spills; needs nvcc but no GPU"
	@echo "make test-cuda-host  run the operator tests on the CUDA kernels, compiled for the CPU with both sanitizers"
	@echo "make bench   measure the operators and models here in about 20 minutes, print the goals, draw runs/report/report.html"
	@echo "make gpu     build, test and measure on an NVIDIA GPU with the torch and triton of PYTHON; installs nothing"
	@echo "make gpu-curve  train twice for five minutes there, plain reference and full stack, bits/dim against seconds"
	@echo "make kernels-report  compile every Triton kernel that has changed and every CUDA kernel, no GPU needed; reports/"
	@echo "make lint    ruff, mypy and clang-format"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make clean   remove .venv and what builds and tests leave behind"
	@echo "PYTHON=python3.12 and TORCH=torch==2.10.0 choose others for a new .venv"

build: $(LIBRARY)

build-cuda: $(INSTALLED)
	GLOW_KERNELS_BUILD=cuda $(BIN)/python setup.py --quiet build_ext --inplace

demo: $(INSTALLED) $(NATIVE)
	$(BIN)/glow-kernels train --run runs/demo --overwrite

test: $(INSTALLED) $(NATIVE)
	$(PYTEST) $(addprefix --ignore ,$(ELSEWHERE))

test-triton: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_triton_compile.py
	TRITON_INTERPRET=1 $(PYTEST) $(OPERATOR_TESTS) tests/test_triton.py -k triton

# nvcc compiles the CUDA library for all GPUs, or for one if these sources are recorded as compiled for all. Without
# nvcc the tests are skipped with a message.
test-cuda: $(INSTALLED)
	$(BIN)/python -m pytest -rs tests/test_cuda_compile.py

# A report of the registers, spills, shared memory and widest accesses of every Triton and CUDA kernel; needs no GPU.
# tests/triton_kernels.csv and tests/cuda_kernels.csv, which are committed, record the sources that have been compiled.
kernels-report: $(INSTALLED)
	$(BIN)/python tests/kernel_record.py reports/kernels.csv
	@GLOW_KERNELS_BUILD=cuda $(BIN)/python setup.py --quiet build_ext --inplace && \
		$(BIN)/python tests/cuda_resources.py reports/cuda_kernels.csv || echo "no report of the CUDA kernels"

# The kernels that run on processors without AVX-512, or without AVX2.
test-variants: $(INSTALLED) $(LIBRARY)
	GLOW_KERNELS_ISA=avx2 $(PYTEST) $(OPERATOR_TESTS) -k $(OF_KERNELS)
	GLOW_KERNELS_ISA=baseline $(PYTEST) $(OPERATOR_TESTS) -k $(OF_KERNELS)

test-sanitized: $(INSTALLED)
	GLOW_KERNELS_ISAS=baseline CXXFLAGS="-O0 $(SANITIZE) -march=native" GLOW_KERNELS_BUILD=cpu $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	$(call PYTEST_SANITIZED,$(SANITIZED)) $(OPERATOR_TESTS)

test-cuda-host: $(INSTALLED)
	CXXFLAGS="-O1 $(SANITIZE)" GLOW_KERNELS_BUILD=cuda-host $(BIN)/python setup.py --quiet build --build-lib $(CUDA_HOST)
	$(call PYTEST_SANITIZED,$(CUDA_HOST)) $(OPERATOR_TESTS)
	GLOW_KERNELS_MULTIPROCESSORS=0 $(call PYTEST_SANITIZED,$(CUDA_HOST)) $(OF_ANY_SIZE)
	$(PYTEST) tests/test_cuda_host.py

# --no-deps, since memcnn's layers need none of the dependencies of its scripts, such as torchvision.
bench: $(INSTALLED) $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps memcnn==1.5.2 || echo "measured without memcnn"
	$(BIN)/glow-kernels bench --check --output runs/bench.jsonl
	$(BIN)/glow-kernels bench report runs/bench.jsonl

# Not in .venv, whose torch may have no CUDA.
gpu:
	$(PYTHON) benchmarks/gpu.py

gpu-curve:
	$(PYTHON) -m benchmarks.gpu_curve

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files $(NATIVE_SOURCES) | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files $(NATIVE_SOURCES) | xargs -r $(BIN)/clang-format -i

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis glow_kernels/_C.* glow_kernels/_C_cuda.*

# find lists the folders too, so that removing a file also counts as a change.
$(LIBRARY): setup.py $(shell find csrc/include csrc/cpu) | $(TORCH_INSTALLED)
	GLOW_KERNELS_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --inplace

no-compiler:
	@echo "no C++ compiler: the native library is not built, the reference backend computes; install g++ or clang++"

# torch is installed first and pinned, since a looser requirement may fetch gigabytes, and an isolated build would fetch
# it again.
$(INSTALLED): pyproject.toml setup.py | $(TORCH_INSTALLED)
	GLOW_KERNELS_BUILD=none $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[train,dev]" $(TRITON)
	@touch $@

$(TORCH_INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "glow_kernels needs Python 3.10 or newer: choose one with 'make PYTHON=python3.12 ...'"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77"
	@touch $@
