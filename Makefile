# make demo: install into .venv, run ViCrop on the demo dataset, print the scores, write the page to look at.
# make test: run the tests.
# make clean: remove the environment and the score tables; results stay.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test clean

demo: .venv/ready
	PYTHON=$(BIN)/python bash run_all.sh demo llava_tiny rel_att --save_maps
	$(BIN)/python -m tools.report data/results/llava_tiny-demo-rel_att.json

test: .venv/ready-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or newer, not " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	touch $@

.venv/ready-tests: .venv/ready
	$(BIN)/pip install -q pytest pytest-xdist pycocotools ruff 'pyright[nodejs]' nbclient ipykernel playwright 'gradio>=6,<7' -c constraints.txt
	touch $@

clean:
	rm -rf .venv data/results/evaluation_report.json data/results/evaluation_report.csv data/results/evaluation_report.md
