# make demo: install into .venv, run ViCrop on the drawn streets, print the scores, write the page to look at.
# make test: run the tests.
# make test-torchvision: those that need torchvision, and all of models and families with it, in an environment of its own.
# make clean: remove the environments and the score tables; results stay.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-torchvision clean

WITH_TORCHVISION := .venv-torchvision
OF_MODELS := $(addprefix tests/test_,torchvision.py families.py more_families.py models.py adapters.py engine.py draft.py generation.py check.py lmms_eval.py)

demo: .venv/ready
	PYTHON=$(BIN)/python bash run_all.sh streets llava_streets rel_att --save_maps
	$(BIN)/python -m tools.report data/results/llava_streets-streets-rel_att.json

test: .venv/ready-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-torchvision: $(WITH_TORCHVISION)/ready
	OMP_NUM_THREADS=1 $(WITH_TORCHVISION)/bin/python -m pytest -n auto --dist loadfile $(OF_MODELS)

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or newer, not " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	touch $@

.venv/ready-tests: .venv/ready
	$(BIN)/pip install -q pytest pytest-xdist pycocotools ruff 'pyright[nodejs]' nbclient ipykernel playwright 'gradio>=6,<7' -c constraints.txt
	touch $@

# All versions are those of constraints.txt, but for torch's, which torchvision decides, and av's, which lmms-eval does.
$(WITH_TORCHVISION)/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv $(WITH_TORCHVISION)
	grep -vE '^(torch|av)==' constraints.txt > $(WITH_TORCHVISION)/constraints.txt
	$(WITH_TORCHVISION)/bin/pip install -q -r requirements.txt torch==2.14.1 torchvision==0.29.1 timm num2words \
		pytest pytest-xdist pycocotools 'lmms-eval>=0.7,<0.8' -c $(WITH_TORCHVISION)/constraints.txt
	touch $@

clean:
	rm -rf .venv $(WITH_TORCHVISION) data/results/evaluation_report.json data/results/evaluation_report.csv \
		data/results/evaluation_report.md
