# make demo       virtual environment, install, then the whole job on an embedded offline example
# make test       virtual environment, install, then everything CI runs
# make test-fast  virtual environment, install, then the mathematics and one run of each command (tests/fast.txt)
# make test-slow  the tests that take minutes, and further cases: half an hour of them; typed again, it goes on with those
#                 that have not passed, and ends with 0 once all have (while some wait, make prints "Error 75")
PYTHON ?= python3
VENV ?= .venv
# Bytecode is kept, also where a container says otherwise: every process would compile this project anew.
RUN = HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python

.PHONY: demo test test-fast test-slow clean

demo: $(VENV)/demo-ready
	$(RUN) demo/run.py

# One thread per worker: short parallel regions of several processes on the same cores wait for each other.
test: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

test-fast: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 @tests/fast.txt

test-slow: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m slow -p tests.resumable --minutes 30 \
	    --passed .pytest_cache/slow-$$(git rev-parse --short HEAD)-$$(git diff HEAD | git hash-object --stdin | cut -c1-12)

$(VENV)/demo-ready: requirements.txt requirements-plots.txt requirements-search.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(patsubst %,-r %,$^)
	touch $@

$(VENV)/test-ready: requirements.txt requirements-plots.txt requirements-search.txt requirements-ray.txt requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
