"""Ways by which backward reads a unit's parameters without autograd having saved them, or needs none of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import data, squared
from entry_cases import EntryCase
from models import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


class UnsavedCase(EntryCase):
    """A loss left on each block, with no other unit below it that would open the block; alone in every other step."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        out = model(x)
        sideways = sum(block.auxiliary for block in model.blocks)
        (sideways if step % 2 else sideways + squared(out, y)).backward()


class KeepsAView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.x, ctx.weight = x.detach(), weight.detach().t()
        return x @ ctx.weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.t(), gradient.t() @ ctx.x


class KeepsAList(torch.autograd.Function):
    """As bitsandbytes keeps what it multiplies by; that gets no gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.tensors = (None, {"B": weight.t()})
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.tensors[1]["B"].t(), None


class KeepsTheParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.x, ctx.weight = x.detach(), weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight, gradient.t() @ ctx.x


class KeepsTheModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module, weight):
        ctx.x, ctx.module = x.detach(), module
        return x @ module.weight.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.module.weight, None, gradient.t() @ ctx.x


class FunctionWithAView(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            self.auxiliary = KeepsAView.apply(x.detach() + self.norm.bias, self.up.weight).sum()
            return super().forward(x)


class FunctionWithAParameter(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            self.auxiliary = KeepsTheParameter.apply(x.detach() + self.norm.bias, self.up.weight).sum()
            return super().forward(x)


class FunctionWithAModule(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            self.auxiliary = KeepsTheModule.apply(x.detach() + self.norm.bias, self.up, self.up.weight).sum()
            return super().forward(x)


class FunctionOfAFrozenWeight(UnsavedCase):
    def prepare(self, model):
        for block in model.blocks:
            block.up.weight.requires_grad_(False)

    class Unit(Block):
        def forward(self, x):
            self.auxiliary = KeepsAList.apply(x.detach() + self.norm.bias, self.up.weight).sum()
            return super().forward(x)


class BiasAlone(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            self.auxiliary = (x.detach() + self.norm.bias).sum()
            return super().forward(x)


class EmbeddingAlone(UnsavedCase):
    class Unit(Block):
        def __init__(self, width):
            super().__init__(width)
            self.table = nn.Embedding(5, width)

        def forward(self, x):
            self.auxiliary = self.table(torch.arange(4)).sum()
            return super().forward(x + self.table.weight[0])


class EarlyStop(UnsavedCase):
    """The recomputation ends at the last saved tensor that backward asks for."""

    class Unit(Block):
        def inner(self, x):
            return self.down(torch.tanh(self.up(x))), self.up(self.norm(x))

        def forward(self, x):
            side, _ = checkpoint(self.inner, x.detach().requires_grad_(), use_reentrant=False)
            self.auxiliary = side.square().sum()
            return super().forward(x)


class Reentrant(UnsavedCase):
    class Unit(Block):
        def inner(self, x):
            return self.down(torch.tanh(self.up(x)))

        def forward(self, x):
            self.auxiliary = checkpoint(self.inner, x.detach().requires_grad_(), use_reentrant=True).square().sum()
            return super().forward(x)


class Vmapped(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            self.auxiliary = torch.func.vmap(lambda row: F.linear(row, self.up.weight).square())(x.detach()).sum()
            return super().forward(x)


class FunctionalCall(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            doubled = {name: 2 * parameter for name, parameter in self.up.named_parameters()}
            self.auxiliary = torch.func.functional_call(self.up, doubled, (x.detach(),)).square().sum()
            return super().forward(x)


class Compiled(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            side = torch.compile(lambda x: torch.tanh(self.up(x)).square().sum(), backend="eager")
            self.auxiliary = side(x.detach())
            return super().forward(x)


class HookReadsTheWeight(UnsavedCase):
    """A hook on a gradient multiplies it by what it reads from the module."""

    class Unit(Block):
        def forward(self, x):
            side = self.norm(x.detach())
            side.register_hook(lambda gradient: gradient * self.norm.weight.detach())
            self.auxiliary = side.square().sum()
            return super().forward(x)


class ParameterHookReadsIt(UnsavedCase):
    def prepare(self, model):
        for block in model.blocks:
            up = block.up
            up.weight.register_hook(lambda gradient, up=up: gradient + 0.1 * up.weight.detach())

    class Unit(Block):
        def forward(self, x):
            self.auxiliary = self.up(x.detach()).square().sum()
            return super().forward(x)


class WeightNormed(UnsavedCase):
    def build(self):
        model = super().build()
        for block in model.blocks:
            nn.utils.parametrizations.weight_norm(block.up)
        return model

    class Unit(Block):
        def forward(self, x):
            self.auxiliary = self.up(x.detach()).square().sum()
            return super().forward(x)


class ViewOfTheWeight(UnsavedCase):
    class Unit(Block):
        def forward(self, x):
            scale = self.norm.weight.view(1, -1).expand_as(x)
            self.auxiliary = torch.addcmul(x.detach(), x.detach(), scale).square().sum() + scale.prod()
            return super().forward(x)


UNSAVED_CASES = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, UnsavedCase) and value is not UnsavedCase
}
