# make demo   the main job on a synthetic guest memory
# make test   all tests that end within ten minutes; see CONTRIBUTING.md for the rest
#
# The virtual environment is .venv. PYTHON=python3.12 uses another Python, JOBS=1 runs the tests one
# after the other, PYTEST_ARGS and BENCH_ARGS are passed to pytest and to the comparison.

PYTHON ?= python3
JOBS ?= 4
VENV := .venv
BIN := $(VENV)/bin
CC ?= cc
WARNINGS := -Wall -Wextra -Wconversion -Werror
CORE := $(wildcard csrc/*.c csrc/*.h csrc/*.py)
BUILD := setup.py pyproject.toml $(CORE)
export PYTHON
# Without byte code, each test process rewrites the assertions of all tests, and each command that a test
# runs compiles the package.
unexport PYTHONDONTWRITEBYTECODE

# In a tree that was moved or copied, .venv still contains the old path.
ifneq ($(wildcard $(VENV)/.place),)
ifneq ($(file < $(VENV)/.place),$(CURDIR))
$(shell rm -rf $(VENV))
endif
endif

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: demo test test-long test-newer-qemu lint types cc docs man sanitize tsan bench readme wheel clean \
        distclean test-system newer-qemu-system bench-system

demo: $(VENV)/.with-cli
	$(BIN)/pyqmigrate demo $(DEMO_ARGS)

# By file, because fixtures of a module start guests; in the order of names, because the longest files
# (tests/qemu) come first then, and files of many short tests last.
PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: test-system $(VENV)/.with-cli,analysis,test
	$(BIN)/python -m pytest $(PARALLEL) -m "not long" $(PYTEST_ARGS)

# What is marked hypothesis (by its plugin) is a property, of which `make test` tries few examples.
test-long: test-system newer-qemu-system $(VENV)/.with-cli,analysis,test
	$(BIN)/python -m pytest $(PARALLEL) -m "long or hypothesis" --hypothesis-profile=long $(PYTEST_ARGS)
	$(MAKE) test-newer-qemu

# The tests against a real QEMU again, with the newest one; skipped with a message if it is not available.
NEWER_QEMU = $${XDG_CACHE_HOME:-$$HOME/.cache}/pyqmigrate-tests/newer-qemu/run/qemu-system-x86_64
test-newer-qemu: newer-qemu-system $(VENV)/.with-cli,analysis,test
	@if [ -x "$(NEWER_QEMU)" ]; then \
	    PYQMIGRATE_TEST_QEMU="$(NEWER_QEMU)" $(BIN)/python -m pytest $(PARALLEL) \
	        -m "qemu and not long" $(PYTEST_ARGS); \
	else echo "test-newer-qemu: skipped, there is no newer QEMU: see above"; fi

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.c csrc/*.h

# The package, and then a program that uses the installed wheel: in a directory of its own, where
# neither checker finds the sources.
TYPED := build/types
types: $(VENV)/.with-dev
	$(BIN)/mypy --strict
	$(BIN)/mypy --strict -p bench
	$(BIN)/basedpyright
	rm -rf $(TYPED)
	mkdir -p $(TYPED)/program
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w $(TYPED) .
	$(PYTHON) -m venv $(TYPED)/venv
	$(TYPED)/venv/bin/pip install -q "$$(echo $(TYPED)/*.whl)[vm]"
	cp tests/typing/public_api.py $(TYPED)/program
	echo '{"typeCheckingMode": "standard", "pythonVersion": "3.11"}' > $(TYPED)/program/pyrightconfig.json
	cd $(TYPED)/program && $(CURDIR)/$(BIN)/mypy --strict --config-file= \
	    --python-executable ../venv/bin/python public_api.py
	cd $(TYPED)/program && $(CURDIR)/$(BIN)/basedpyright --level error -p . --pythonpath ../venv/bin/python

# The pages in build/docs, with a reference made from the docstrings.
docs: man $(VENV)/.with-docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

# The manual pages in build/man, from the parser of the command: man -l build/man/pyqmigrate.1
man: $(VENV)/.with-docs
	$(BIN)/python docs/manpages.py build/man

# The optimiser is on because some warnings come from it.
cc:
	@.ci/ensure-system compiler
	@mkdir -p build/cc
	@for source in csrc/*.c; do \
	    echo "$(CC) $(WARNINGS) $$source"; \
	    $(CC) -std=gnu11 -O2 -fPIC $(WARNINGS) -c $$source -o build/cc/$$(basename $$source .c).o || exit 1; \
	done

# The core's tests with a sanitized core, in a copy of the tree, so that the core in use is not
# changed. LD_PRELOAD loads the runtime before Python allocates; Python leaks by design. Output is not
# captured by descriptor, because a report would be lost with pytest.
SANITIZED_TESTS ?= tests/unit/core
define sanitized
	rm -rf build/$(1)
	mkdir -p build/$(1)
	cp -R pyproject.toml setup.py README.md LICENSE csrc pyqmigrate tests build/$(1)
	find build/$(1) -name '*.so' -delete
	cd build/$(1) && CC="$(CC)" LDSHARED="$(CC) -shared" CFLAGS="-g -O1 -fno-omit-frame-pointer $(2)" \
	    $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	nm -D build/$(1)/pyqmigrate/_core*.so | grep -q '__$(1)_init'
	cd build/$(1) && env LD_PRELOAD="$$($(CC) -print-file-name=lib$(1).so)" $(3) \
	    $(CURDIR)/$(BIN)/python -m pytest --capture=sys -p no:cacheprovider $(SANITIZED_TESTS)
endef

sanitize: $(VENV)/.with-cli,analysis,test
	$(call sanitized,asan,-fsanitize=address$(comma)undefined -fno-sanitize-recover=all,\
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1)

# Only the core is instrumented: TSan cannot see how Python's own threads synchronise. Its memory map
# needs an address space that is not randomised.
tsan: $(VENV)/.with-cli,analysis,test
	$(call sanitized,tsan,-fsanitize=thread,\
	    TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" setarch -R)

bench: bench-system $(VENV)/.with-cli,bench
	@mkdir -p build/bench
	$(BIN)/python bench/compare --json build/bench/samples.json \
	    --growth-plot docs/pictures/growth.svg $(BENCH_ARGS)
	$(BIN)/python -m pytest bench/micro bench/test_readme_table.py bench/compare/test_growth_chart.py --benchmark-json=build/bench/micro.json $(MICRO_ARGS)

# README's table and chart, from the last `make bench`.
readme: $(VENV)/.with-bench
	$(BIN)/python bench/readme_table.py build/bench/samples.json
	$(BIN)/python bench/readme_chart.py

# The wheel is built from the sdist, so both are tested. Both contain the manual pages, in man/, because
# an sdist never contains files of build/.
wheel: $(VENV)/.with-dev man
	rm -rf dist build/wheel-venv man
	cp -R build/man man
	$(BIN)/python -m build
	rm -rf man
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/python .ci/check-dist dist
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install -q dist/*.whl
	cd build && wheel-venv/bin/pyqmigrate --help >/dev/null

clean:
	rm -rf build dist man *.egg-info pyqmigrate/_core*.so $(VENV)/.with-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyqmigrate csrc tests bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# First, so that a user who cannot install gets one command for everything.
test-system:
	@.ci/ensure-system python compiler qemu

newer-qemu-system:
	@.ci/ensure-system newer-qemu

bench-system:
	@.ci/ensure-system python compiler qemu bench

# The package, editable, with the extras in the file's name. The core is compiled again when its sources
# or its build change. Built without isolation, so that the second time needs no network.
$(VENV)/.with-%: $(VENV)/.place $(BUILD)
	$(BIN)/pip install -q --no-build-isolation -e '.[$*]'
	@touch '$@'

$(VENV)/.place:
	@.ci/ensure-system python compiler
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	    | $(BIN)/pip install -q -r /dev/stdin
	@printf %s '$(CURDIR)' > $@

comma := ,
