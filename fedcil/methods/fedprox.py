"""FedProx (Li et al., arXiv 1812.06127, equation 2): FedAvg with a pull towards the round's start.

loss = CE + (mu / 2) ||w - w_global||^2, the norm squared as in the paper (some published code is not).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedcil.losses import proximal
from fedcil.methods.base import Batch, Draws, Method, Prepared, cross_entropy_seen
from fedcil.methods.settings import MethodSettings
from fedcil.models.network import Network
from fedcil.section import NonNegative


class FedProx(MethodSettings):
    name: Literal["fedprox"] = "fedprox"
    mu: NonNegative = Field(0.01, description="strength of the pull to the global model; 0 is FedAvg")

    def build(self) -> Method:
        def loss(model: Network, prepared: Prepared, batch: Batch, draws: Draws) -> Tensor:
            plain = cross_entropy_seen(model, prepared, batch, draws)
            if self.mu == 0:
                return plain
            return plain + self.mu / 2 * proximal(list(model.parameters()), batch.anchor)

        return Method(loss=loss)
