"""Whatever is timed in turn, each as a program of its own, driven line by line (session.py); simulators of others in an
environment of their own.
"""

import os

# Before a peer imports its library: no reports of usage, no look for updates, no GPU.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PFL_PYTORCH_DEVICE": "cpu",
}
