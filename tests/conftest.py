"""Before PyTorch loads OpenMP: where other processes compete for the cores, and the server tests start several, threads
that spin for each other take minutes."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
