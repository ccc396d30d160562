"""Tensors, operators' placement, autocast and generators, as torch shows them for a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from played_card.card import Block, Card

CUDA = torch.device("cuda", 0)
NARROW = {  # operators that autocast has done in bf16, and in fp32, of those that fedcil calls
    *(torch.conv2d, F.conv2d, torch.conv_transpose2d, F.conv_transpose2d, F.linear),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.baddbmm, torch.addmm),
}
WIDE = {
    *(F.cross_entropy, F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax, torch.softmax, Tensor.softmax),
    *(F.mse_loss, F.kl_div, torch.exp, torch.log),
    *(torch.pow, Tensor.pow, torch.norm, Tensor.norm, torch.sum, Tensor.sum),
}


class OnCard(Tensor):
    """``host`` holds the numbers; to torch's dispatcher a tensor of CUDA without memory."""

    host: Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, block: Block) -> OnCard:
        bare = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")
        made: OnCard = Tensor._make_subclass(cls, bare, False, device_for_backend_keys=CUDA)
        made.host, made.block = host, block
        return made

    def __init__(self, host: Tensor, block: Block) -> None:
        pass

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: OnCard) -> None:
        with _disable_current_modes():
            Tensor.data.__set__(self, other)
        self.host, self.block = other.host, other.block

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __setitem__(self, where: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            super().__setitem__(where, value)
        else:
            self[where].fill_(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = copy = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copy._is_param = True
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        card = next(each.block.card for each in tree_leaves((args, kwargs)) if isinstance(each, OnCard))
        return card.launch(func, args, kwargs or {})


class Placed(TorchDispatchMode):
    """Sees what is made on the card from nothing, and what comes from the CPU."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card, self.autocast = card, Autocast()

    def __enter__(self) -> Placed:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") asks for its copy where it is seen
        super().__enter__()
        self.autocast.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.autocast.__exit__(*error)
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.card.launch(func, args, kwargs or {})


class Autocast(TorchFunctionMode):
    """``torch.autocast("cuda")``, which torch itself does for tensors whose memory it knows to be there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = torch.bfloat16 if func in NARROW else torch.float32 if func in WIDE else None
        if wanted and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map(lambda x: x.to(wanted) if _narrowable(x) else x, (args, kwargs))
        return func(*args, **kwargs)


def _narrowable(value: Any) -> bool:
    return isinstance(value, OnCard) and value.dtype in (torch.float32, torch.bfloat16)


class Generator(torch.Generator):
    """Draws as a CPU's, wherever it belongs."""

    belongs: ClassVar[dict[int, str]] = {}  # an operator is given another object of Python's for it

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        cls.belongs[made._cdata] = torch.device(device).type
        return made
