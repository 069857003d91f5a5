# `make demo` and `make test` do all of their own set-up in .venv; see README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
TESTS ?= tests
# The set of versions: where it is installed, what it is, and the Pythons that it is for.
VENV := .venv
REQUIREMENTS := requirements.txt
PYTHONS := 3.10 3.11 3.12
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A stamp names what it was made from: edited requirements, or another Python, make a new one.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
VENV_DONE := $(VENV)/.stamp-venv-$(PYTHON_VERSION)
TORCH_DONE := $(VENV)/.stamp-torch-$(shell grep -E '^(torch|numpy|setuptools|wheel|ninja|psutil)' $(REQUIREMENTS) | cksum | cut -d' ' -f1)
MMCV := $(shell grep -oE '^(onedl-)?mmcv==[^ ;]+' $(REQUIREMENTS))
MMCV_DONE := $(TORCH_DONE)-$(subst ==,-,$(MMCV))
SETUP_DONE := $(VENV)/.stamp-setup-$(shell cat $(REQUIREMENTS) pyproject.toml setup.py $$(find mmdyn -name '*.[ch]' | LC_ALL=C sort) | cksum | cut -d' ' -f1)

.PHONY: help setup lint test test-forks test-oldest run-tests docs sanitize demo demo-det demo-seg demo-cls-cf bench results results-time gpu-kit clean
help:
	@echo 'make setup      create .venv, install the pinned requirements, compile mmcv (10 to 20 minutes, once)'
	echo 'make lint       set up, then check style, format and types of the Python files, and the format of the C files'
	echo 'make test       set up, lint, then run the tests'
	echo 'make test-forks   run the tests with the maintained forks of OpenMMLab and a recent torch, in .venv-forks'
	echo 'make test-oldest  run the tests with the least versions that mmdyn allows, in .venv-oldest'
	echo 'make docs       build the documentation into build/site; it needs nothing of the set-up'
	echo 'make sanitize   set up, then test and fuzz the compiled functions with address and undefined-behaviour sanitizers'
	echo 'make demo       set up, then train PVT on the demo data, make it dynamic, test both and draw the gates'
	echo 'make demo-det   the same for Mask R-CNN, with the instances it finds'
	echo 'make demo-seg   the same for Semantic FPN, with its segmentation'
	echo 'make demo-cls-cf  set up, then train DeiT and CF-ViT, sweep the threshold and draw the regions'
	echo 'make bench      time dense and dynamic models beside mmdet, timm, mmcv, onnxruntime and OpenVINO, and write docs/benchmark.md'
	echo 'make results    train and test what docs/results.md shows on real images, for 15 hours or more, and write it: see docs/data.md'
	echo 'make results-time  time what is trained; on a machine that does nothing else'
	echo 'make gpu-kit    collect the wheels that tools/gpu_check.sh needs on a machine with a GPU and no package index'
	echo 'make clean      remove .venv, .venv-docs, the demo data and work_dirs/demo'

setup: $(SETUP_DONE)

$(VENV_DONE):
	@[[ ' $(PYTHONS) ' = *" $$(cut -d. -f1,2 <<< '$(PYTHON_VERSION)') "* ]] || { echo "$(REQUIREMENTS) is for CPython $(PYTHONS), but '$(PYTHON)' is '$(PYTHON_VERSION)'. Give another one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $@

$(TORCH_DONE): $(VENV_DONE)
	@command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler ('$${CXX:-c++}'), which mmcv is compiled with. Install one (Debian: apt-get install g++) or name it with CXX=..." >&2; exit 1; }
	$(BIN)/python -c 'import os, sys, sysconfig; d = sysconfig.get_path("include"); os.path.isfile(os.path.join(d, "Python.h")) or sys.exit(f"No Python.h in {d}, which mmcv is compiled with. Install the headers of this Python (Debian: apt-get install python3-dev).")'
	echo '== torch (1/3) =='
	$(BIN)/pip install -c <(grep -vE '^(onedl-)?mmcv==' $(REQUIREMENTS)) torch torchvision numpy setuptools wheel ninja packaging psutil
	touch $@

# No build isolation, so that the operators are compiled against the torch of .venv; a wheel cache of its own for
# each torch, because pip would hand a wheel that was compiled for one torch to another.
$(MMCV_DONE): $(TORCH_DONE)
	@echo '== mmcv with its operators (2/3): compiled here, 10 to 20 minutes on 2 cores, log in $(VENV)/mmcv.log =='
	cache=$$($(BIN)/pip cache dir)/mmcv-for-$$($(BIN)/python -c 'import torch; print(f"torch-{torch.__version__}")')
	MMCV_WITH_OPS=1 $(BIN)/pip install -v --cache-dir "$$cache" --no-deps --no-build-isolation $(MMCV) > $(VENV)/mmcv.log 2>&1 &
	pip=$$!
	trap 'kill $$pip 2>/dev/null' INT TERM
	while kill -0 $$pip 2>/dev/null; do
		sleep 5
		step=$$(grep -oE '^ *\[[0-9]+/[0-9]+\]' $(VENV)/mmcv.log | tail -n 1 || true)
		[ "$$step" = "$${last-}" ] || echo "mmcv: compiled $$step"
		last=$$step
	done
	wait $$pip || { tail -n 40 $(VENV)/mmcv.log; echo 'mmcv did not compile; the whole log is $(VENV)/mmcv.log' >&2; exit 1; }
	touch $@

$(SETUP_DONE): $(MMCV_DONE)
	@echo '== everything else (3/3) =='
	$(BIN)/pip install -r $(REQUIREMENTS)
	$(BIN)/pip install --no-deps -e .
	touch $@

lint: setup
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find mmdyn -name '*.[ch]' | xargs -r $(BIN)/clang-format --dry-run -Werror

test: lint
	@$(BIN)/python -m pytest tests

# Each in an environment of its own. The style is checked once, with requirements.txt.
test-forks:
	@$(MAKE) VENV=.venv-forks REQUIREMENTS=requirements-forks.txt PYTHONS='3.10 3.11 3.12 3.13' run-tests

test-oldest:
	@$(MAKE) VENV=.venv-oldest REQUIREMENTS=requirements-oldest.txt PYTHONS=3.10 PYTHON=$(OLDEST_PYTHON) run-tests

run-tests: setup
	@$(BIN)/python -m pytest $(TESTS)

# The documentation reads the sources and imports nothing: an environment of its own, without torch, is enough.
DOCS := .venv-docs
DOCS_DONE := $(DOCS)/.stamp-docs-$(PYTHON_VERSION)-$(shell cksum < requirements-docs.txt | cut -d' ' -f1)
$(DOCS_DONE):
	@rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q -r requirements-docs.txt
	touch $@

docs: $(DOCS_DONE)
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# A copy of the package whose kernels are built with gcc's sanitizers. They must be loaded before all else, since Python is
# not built with them; what Python leaks is its own business. The copy comes first on the path because it is where Python
# starts. Workspaces and tensors lie between guarded memory then, and each call of the fuzz has a workspace of its size.
# Graphs have nothing of C, and torch's compiler aborts beside the sanitizers.
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
FUZZ_CALLS ?= 6000
FUZZ_SEED ?= 0
sanitize: setup
	@rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)/lib
	cp -r mmdyn $(SANITIZED)/lib
	rm -f $(SANITIZED)/lib/mmdyn/kernels/_cpu*
	CC=gcc CFLAGS='$(SANITIZERS)' LDFLAGS='$(SANITIZERS)' $(BIN)/python setup.py -q build_ext --build-temp $(SANITIZED)/temp --build-lib $(SANITIZED)/lib
	root=$$PWD
	cd $(SANITIZED)/lib
	export LD_PRELOAD="$$(for name in asan ubsan stdc++; do gcc -print-file-name=lib$$name.so; done | paste -sd' ')"
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive
	export MMDYN_SANITIZED=1 MMDYN_REQUIRE_KERNELS=1 MMDYN_FUZZ_CALLS=$(FUZZ_CALLS) MMDYN_FUZZ_SEED=$(FUZZ_SEED)
	$$root/$(BIN)/python -m pytest --capture=sys -p no:cacheprovider --ignore=$$root/tests/kernels/test_graphs.py $$root/tests/kernels

# $(call run-demo,configs,the one of them whose gates are drawn,images,masks,options of draw_gates.py)
define run-demo
@$(BIN)/python tools/dataset_tools/make_demo_dataset.py
$(BIN)/python tools/demo.py $(patsubst %,configs/demo/%.py,$(1))
run=work_dirs/demo/$(2)
$(BIN)/python tools/visualizations/draw_gates.py configs/demo/$(2).py "$$(cat $$run/last_checkpoint)" --predictions \
	--images data/demo/$(3) --masks data/demo/$(4) --out $$run/gates $(5)
endef

# Beside another busy process, threads that spin for long while they wait hold up those that work; ones that do not spin at
# all take twice as long where nothing else runs. `make bench` stays as it is.
ifndef OMP_WAIT_POLICY
demo demo-det demo-seg demo-cls-cf: export GOMP_SPINCOUNT ?= 1000
endif

demo: setup
	$(call run-demo,pvt-mini_digits pvt-mini-finetune_digits pvt-mini-dge_digits,pvt-mini-dge_digits,imagenet/val,imagenet/masks/val)

# The images of all dense tasks are the same, so that the masks of segmentation serve detection, too.
demo-det: setup
	$(call run-demo,mask-rcnn_pvt-mini_digits mask-rcnn_pvt-mini-finetune_digits mask-rcnn_pvt-mini-dge_digits,mask-rcnn_pvt-mini-dge_digits,coco/val2017,ade/annotations/validation,--background 11 --side 256 --score-thr 0.5)

demo-seg: setup
	$(call run-demo,fpn_pvt-mini_digits fpn_pvt-mini-finetune_digits fpn_pvt-mini-dge_digits,fpn_pvt-mini-dge_digits,ade/images/validation,ade/annotations/validation,--background 11 --side 256)

demo-cls-cf: setup
	@$(BIN)/python tools/dataset_tools/make_demo_dataset.py
	$(BIN)/python tools/demo.py configs/demo/vit-mini_digits.py configs/demo/vit-mini-finetune_digits.py \
		configs/demo/cf-vit-mini_digits.py
	run=work_dirs/demo/cf-vit-mini_digits
	checkpoint=$$(cat $$run/last_checkpoint)
	$(BIN)/python tools/analysis_tools/sweep_threshold.py configs/demo/cf-vit-mini_digits.py "$$checkpoint" --out $$run/threshold
	$(BIN)/python tools/visualizations/draw_regions.py configs/demo/cf-vit-mini_digits.py "$$checkpoint" \
		--images data/demo/imagenet/val --masks data/demo/imagenet/masks/val --out $$run/regions

# What the trained routers choose is one of the routings.
TRAINED := work_dirs/demo/pvt-mini-dge_digits/last_checkpoint
$(TRAINED): | setup
	@$(MAKE) demo

bench: setup $(TRAINED)
	@$(BIN)/pip install -q -r requirements-bench.txt
	$(BIN)/python tools/analysis_tools/benchmark.py --suite all --out docs

# One thread each, whatever else runs; see docs/data.md.
results results-time: export OMP_NUM_THREADS := 1
results: setup
	@$(BIN)/python tools/analysis_tools/results.py

results-time: setup
	@$(BIN)/python tools/analysis_tools/results.py --time

# For CPython 3.12 on Linux x86-64 (docs/gpu.md). mmcv-lite is mmcv without compiled operators, but with their sources.
GPU_KIT := .gpu-kit
GPU_PACKAGES := mmengine mmpretrain mmdet mmsegmentation timm ftfy regex pycocotools
gpu-kit: $(VENV_DONE)
	@rm -rf $(GPU_KIT)
	platforms=$$(for glibc in 28 27 24 17 12 5; do echo "--platform manylinux_2_$${glibc}_x86_64"; done)
	$(BIN)/pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.12 $$platforms \
		--platform manylinux2014_x86_64 -d $(GPU_KIT) -c requirements.txt -r requirements-gpu.txt $(GPU_PACKAGES) \
		$$(sed -n 's/^mmcv==/mmcv-lite==/p' requirements.txt)
	size=$$(du -sm $(GPU_KIT) | cut -f1)
	echo "$(GPU_KIT): $$(ls $(GPU_KIT) | wc -l) wheels, $$size MB"
	[ $$size -lt 45 ] || { echo 'That is too much to travel: at most 45 MB. See requirements-gpu.txt.' >&2; exit 1; }

clean:
	rm -rf .venv .venv-docs .venv-forks .venv-oldest $(GPU_KIT) data/demo work_dirs/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
