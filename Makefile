# Everything a checkout needs. `make demo` and `make test` do all the set-up themselves, given Python ≥ 3.10 and make.
VENV := .venv
VENV_OPTIMUM := .venv-optimum
DEMO := runs/demo
# As many processes as the machine has cores, at most four: each imports torch and transformers once.
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
RUN := $(DEMO)
FUZZ := 500
DOORS := tests/whole/test_doors.py tests/train/data tests/export/files tests/export/recipe tests/export/run tests/export/test_console.py

.DEFAULT_GOAL := help
.PHONY: help docs demo tour test check audit test-compat check-servers bench-onnx bench-bits mutate fuzz clean setup setup-optimum

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: setup ## compress the built-in model, export it to ONNX, prove it; the report is runs/demo/report.md
	@echo "== $(VENV)/bin/soco-export train-and-export --model tiny --format onnx --out $(DEMO)"
	@$(VENV)/bin/soco-export train-and-export --model tiny --format onnx --out $(DEMO)

tour: demo ## put the demo's output into README.md
	@$(VENV)/bin/python tools/tour.py $(DEMO) README.md

test: setup ## run the tests
	@echo "== running the tests"
	@$(VENV)/bin/python $(PYTEST)

check: setup ## format, lint, types, import direction, dependencies
	@echo "== ruff, mypy, import-linter, deptry"
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/deptry .

audit: setup ## known vulnerabilities of what is installed, where SOCO_ADVISORIES names a database on this disk
	@$(VENV)/bin/python tools/audit.py

test-compat: setup-optimum ## run the tests that meet transformers once more with 4.57 and optimum, in an environment of their own
	@echo "== running the tests that meet transformers with transformers 4.57 and optimum"
	@$(VENV_OPTIMUM)/bin/python $(PYTEST) -m "transformers or optimum"

check-servers: setup ## start every server installed here on RUN (runs/demo), compare with PyTorch, then 16 clients
	@$(VENV)/bin/python -m benchmarks.servers --run $(RUN)

bench-onnx: setup ## measure the tables of benchmarks/speed again (about three quarters of an hour on an idle machine)
	@$(VENV)/bin/python -m benchmarks.speed --fresh --others $(addprefix --optimum-python ,$(wildcard $(VENV_OPTIMUM)/bin/python))
	@$(VENV)/bin/python -m benchmarks.speed --fresh --model smollm2 --weights fp32 int4 --pack
	@$(VENV)/bin/python -m benchmarks.speed --fresh --model smollm2 --weights fp32 --bias

mutate: setup ## plant known faults one by one: does a test notice? (some minutes)
	@$(VENV)/bin/python tools/mutate

fuzz: setup ## try every reader with random input for about an hour (FUZZ=500 times as much as the tests do)
	@SOCO_FUZZ=$(FUZZ) $(VENV)/bin/python $(PYTEST) --timeout=14400 -m hypothesis $(DOORS)

bench-bits: setup ## what int4 and int2 lose on the built-in model: rounded to nearest, calibrated, trained as rounded (minutes)
	@$(VENV)/bin/python -m benchmarks.bits dense=soco_train/builtin/tiny --keep 0.8 0.6 --rules nearest calibrated trained --out benchmarks/bits/results/tiny

docs: setup ## build the documentation site into site/ (needs the extra docs)
	@$(VENV)/bin/python -m pip install --quiet '.[docs]'
	@$(VENV)/bin/python -m mkdocs build --strict

clean: ## remove what the targets above made, runs/ included
	rm -rf $(VENV) $(VENV_OPTIMUM) runs dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

setup: ## make .venv and install everything into it
	@tools/make-venv $(VENV) tools/constraints-transformers-5.txt genai,serve,report,pack,dev

setup-optimum:
	@ACCELERATOR=cpu tools/make-venv $(VENV_OPTIMUM) tools/constraints-transformers-4.txt optimum,report,dev
