"""The plain loop as a process of its own: the baseline, and the pattern for peers.

python -m scenarios.benchmarks.peers.plain DATA.npz [kept], then begin lenet|cnn4|resnet18 pictures|tensors|exact

``kept``: freed memory stays with the process, as with fedcil, and not as the C library comes.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from fedcil.allocator import keep_freed_memory
from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.plain import PlainLoop

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["kept"]:
        keep_freed_memory()
    answer(partial(PlainLoop, Path(sys.argv[1])))
