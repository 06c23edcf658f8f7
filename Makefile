# Every target sets up what it needs in .venv and costs nothing when nothing it depends on changed.
# `make demo` and `make test` need python3 (3.10 or newer), a C++20 compiler and the package registries;
# pip brings cmake and ninja when they are missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
DONE := $(VENV)/done
export PIP_DISABLE_PIP_VERSION_CHECK = 1

NATIVE := pyproject.toml CMakeLists.txt native native/bind \
  $(wildcard native/CMakeLists.txt native/*.cpp native/*.h native/bind/*)

.DEFAULT_GOAL := build
.PHONY: build demo test test-slow test-arm models lint stub bench table fuzz sdist clean

build: $(DONE)/edgert

demo: $(DONE)/edgert
	@$(BIN)/edgert pull smollm2-135m
	$(BIN)/edgert run smollm2-135m "Why is the sky blue?"

# Two files at a time, in the order of their names: test_packaging, few tests that take long, must not come
# last. Then what measures, alone.
test: lint models
	$(BIN)/python -m pytest -m "not slow and not arm and not alone" -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m "alone and not slow and not arm"

test-slow: models
	$(BIN)/python -m pytest -m slow

# The two real models of the tests, from the cache of `edgert pull` unless EDGERT_MODELS has them.
models: $(DONE)/peer
	@[ -n "$$EDGERT_MODELS" ] || for name in smollm2-135m gemma-3-270m; do $(BIN)/edgert pull $$name || exit 1; done

# Needs Debian's g++-aarch64-linux-gnu and qemu-user.
test-arm: $(DONE)/test
	$(BIN)/python -m pytest -m arm

# A tree of links stands in for the installed package: mypy cannot follow the path mapping of
# pyproject.toml, where models/ is edgert.models and so on.
lint: $(DONE)/edgert $(DONE)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/edgert
	@ln -s $(CURDIR)/edgert/* $(CURDIR)/models $(CURDIR)/platforms $(CURDIR)/bench $(CURDIR)/export \
	  build/typing/edgert/
	cd build/typing && ../../$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p edgert

# After a change to native/bind: the types Python sees, committed beside the package.
stub: $(DONE)/edgert $(DONE)/test
	$(BIN)/python -m nanobind.stubgen -q -m edgert._native -o edgert/_native.pyi
	$(BIN)/ruff format -q edgert/_native.pyi
	$(BIN)/ruff check -q --fix edgert/_native.pyi

bench: models
	$(BIN)/python -m edgert.bench.compare

# README's table from the newest results.
table: $(DONE)/edgert
	$(BIN)/python -m edgert.bench.readme_table

fuzz: $(DONE)/test
	$(MAKE) -C fuzz

sdist: $(DONE)/test
	$(BIN)/python -m build -o dist

clean:
	rm -rf $(VENV) build dist

$(DONE)/venv:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U "pip>=25.1"
	@mkdir -p $(DONE) && touch $@

# The build back end says itself whether cmake or ninja must come from the registry.
$(DONE)/tools: pyproject.toml | $(DONE)/venv
	$(PIP) install -q --group build
	@extra=$$($(BIN)/python -c "import scikit_build_core.build as b; \
	print(*b.get_requires_for_build_wheel({}))") && \
	  if [ -n "$$extra" ]; then $(PIP) install -q $$extra; fi
	@touch $@

# Editable: Python changes count at once, C++ changes with the next make (incremental, build/).
$(DONE)/edgert: $(NATIVE) $(DONE)/tools
	$(PIP) install -q --no-build-isolation -e .
	@touch $@

# Torch comes first and alone: its own index has the CPU build, an eighth of the default one's size,
# and a machine that cannot reach that index loses seconds on one package instead of on thirty.
$(DONE)/test: pyproject.toml | $(DONE)/edgert
	$(PIP) install -q --group test
	$(PIP) install -q --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
	$(PIP) install -q --group reference
	@touch $@

# Only as a source package: compiled once, then taken from pip's cache. The multimodal library and
# the tools are left out; the kernels are what pip install would give.
$(DONE)/peer: pyproject.toml | $(DONE)/test
	@echo "llama-cpp-python is compiled the first time: 5 to 10 minutes on 2 cores"
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/cmake/llama_peer.cmake" \
	  $(PIP) install -q --group peer
	@touch $@
