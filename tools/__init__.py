"""Commands beside run.py: data preparation, the page of results, the findings."""
