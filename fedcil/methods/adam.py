"""Adam (Kingma and Ba, arXiv 1412.6980) by torch's functional form.

``torch.optim.Adam`` gives the same bits, but making one imports torch's compiler: a second of CPU in every process.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from fedcil.gradients import as_stored, gradients


class Adam:
    """betas 0.9 and 0.999, eps 1e-8, no weight decay."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.stored = [as_stored(parameter) for parameter in self.parameters]
        self.first = [torch.zeros_like(parameter) for parameter in self.stored]
        self.second = [torch.zeros_like(parameter) for parameter in self.stored]
        # The fused kernel of a GPU reads counters as float32, whatever the parameters are.
        self.steps = [torch.zeros((), dtype=torch.float32, device=each.device) for each in self.parameters]

    def reset(self) -> None:
        """As before the first step."""
        for each in (*self.first, *self.second, *self.steps):
            each.zero_()

    def step(self, loss: Tensor) -> None:
        """One update; ``loss`` must reach every parameter."""
        adam(
            self.stored,
            [as_stored(gradient) for gradient in gradients(loss, self.parameters) if gradient is not None],
            self.first,
            self.second,
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
