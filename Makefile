# make demo       virtual environment, install, then the whole job on an embedded offline example
# make test       virtual environment, install, then everything CI runs
# make test-slow  the tests that take minutes
PYTHON ?= python3
VENV ?= .venv
RUN = HF_HUB_OFFLINE=1 $(VENV)/bin/python

.PHONY: demo test test-slow clean

demo: $(VENV)/demo-ready
	$(RUN) demo/run.py

test: $(VENV)/test-ready
	$(RUN) -m pytest

test-slow: $(VENV)/test-ready
	$(RUN) -m pytest -m slow

$(VENV)/demo-ready: requirements.txt requirements-plots.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-plots.txt
	touch $@

$(VENV)/test-ready: requirements.txt requirements-plots.txt requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
