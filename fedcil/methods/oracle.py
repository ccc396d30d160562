"""Oracle: FedAvg whose clients keep all data they ever had. The ceiling, not a method anyone may use."""

from __future__ import annotations

from typing import Literal

from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings


class Oracle(MethodSettings):
    name: Literal["oracle"] = "oracle"

    def build(self) -> Method:
        return Method(data="so_far")
