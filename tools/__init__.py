"""Commands beside run.py: data preparation, the page of results, the findings."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see run.py; here, for it counts before torch is loaded
