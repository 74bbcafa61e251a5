"""BK-SDM (arXiv 2305.15798) as a workbook: the thin package under the notebooks."""

import os

__version__ = "0.1.0"

# Threads that sleep while they wait wake too late for small networks; threads that spin for long block cores that
# others need. A short spin is as fast as the second and as polite as the first. Read when torch is loaded, also by the
# kernels and processes that this one starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
