"""Settings that must be made before torch is first imported."""

import os

# torch's OpenMP threads spin while they wait, and starve the processes that tests start on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
