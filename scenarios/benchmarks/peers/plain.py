"""The plain loop as a process of its own, with the C library as it comes: the baseline, and the pattern for peers.

python -m scenarios.benchmarks.peers.plain DATA.npz, then begin lenet|cnn4|resnet18 pictures|tensors|exact
"""

import sys
from functools import partial
from pathlib import Path

import torch

from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.plain import PlainLoop

if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(partial(PlainLoop, Path(sys.argv[1])))
