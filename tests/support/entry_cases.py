"""Ways by which backward, or another module, comes to a unit's parameters without its return value telling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import Case, data, squared
from models import Block, Stack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class EntryCase(Case):
    """`Unit` is the block, `run` what the model does with its blocks."""

    Unit: type[Block] = Block

    def build(self) -> nn.Module:
        case = self

        class Model(Stack):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(case.Unit(7) for _ in range(3))

            def forward(self, x):
                return case.run(self, x)

        return Model()

    def run(self, model, x):
        x = model.first(x)
        for block in model.blocks:
            x = self.pass_through(block, x)
        return model.last(x)

    def pass_through(self, block, x):
        return block(x)


@dataclass(frozen=True)
class Inner:
    x: Tensor


@dataclass
class Outer:
    inner: Inner
    gate: float = 0.5


class InDataclasses(EntryCase):
    class Unit(Block):
        def forward(self, state: Outer):
            return Outer(Inner(super().forward(state.inner.x) * state.gate), state.gate)

    def run(self, model, x):
        state = Outer(Inner(model.first(x)))
        for block in model.blocks:
            state = block(state)
        return Outer(Inner(model.last(state.inner.x)))

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(model(x).inner.x, y).backward()


class InAnObject(EntryCase):
    """Nobody can open it; elementwise parameters come last."""

    class Unit(Block):
        def forward(self, box):
            x = super().forward(box[0]()) * torch.sigmoid(self.norm.weight)
            return [lambda: x]

    def run(self, model, x):
        x = model.first(x)
        box = [lambda: x]
        for block in model.blocks:
            box = block(box)
        out = model.last(box[0]())
        return [lambda: out]

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(model(x)[0](), y).backward()


class LossOnTheModule(EntryCase):
    class Unit(Block):
        def forward(self, x):
            out = super().forward(x)
            self.auxiliary = self.up.weight.square().mean() + self.down(torch.tanh(self.up(x))).square().mean()
            return out

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        (squared(model(x), y) + sum(block.auxiliary for block in model.blocks)).backward()


class OnlyTheLossOnTheModule(LossOnTheModule):
    """What the model returns is not under the loss."""

    def step(self, model, rank, step, quiet):
        model(data(rank, step)[0])
        sum(block.auxiliary for block in model.blocks).backward()


class LossInAClosure(EntryCase):
    """A hook of the user's gathers what a layer inside a unit gives."""

    def step(self, model, rank, step, quiet):
        kept = []
        hook = model.blocks[1].up.register_forward_hook(lambda module, args, out: kept.append(torch.tanh(out) * out))
        x, y = data(rank, step)
        (squared(model(x), y) + kept[0].sum()).backward()
        hook.remove()


class CheckpointedLoss(LossOnTheModule):
    """Recomputed tensors come by other hooks on saved tensors."""

    def pass_through(self, block, x):
        def both(x):
            return block(x), block.auxiliary

        out, block.auxiliary = checkpoint(both, x, use_reentrant=False)
        return out


class SavedOnTheHost(LossOnTheModule):
    def step(self, model, rank, step, quiet):
        with torch.autograd.graph.save_on_cpu():
            super().step(model, rank, step, quiet)


class ViewInPlace(EntryCase):
    def pass_through(self, block, x):
        out = block(x)
        out.mul_(1.5)
        return out.flatten(0, 1)

    class Unit(Block):
        def forward(self, x):
            return super().forward(x).view(2, -1, x.shape[-1])


class OneViewAmongTensors(EntryCase):
    class Unit(Block):
        def forward(self, x):
            out = super().forward(x)
            return out.view(2, -1, x.shape[-1]), out.sum()

    def pass_through(self, block, x):
        view, total = block(x)
        view.add_(0.25)
        return view.flatten(0, 1) + total.detach()


class InPlaceOnInputs(EntryCase):
    """A residual stream; the block's third input gets no gradient."""

    class Unit(Block):
        def forward(self, x, stream, unused=None):
            stream += x
            return self.down(torch.tanh(self.up(self.norm(stream.clone())))), stream

    def run(self, model, x):
        x = unused = model.first(x)
        stream = x * 0.5
        for block in model.blocks:
            x, stream = block(x, stream, unused=unused * 2)
        return model.last(x + stream)


class PartFromOutside(EntryCase):
    """A part of one unit is called by the model, before that unit runs and after."""

    def run(self, model, x):
        x = model.first(x)
        scale = model.blocks[2].norm(x)
        for block in model.blocks:
            x = block(x) + scale
        return model.last(model.blocks[0].norm(x))


class ParameterReadByTheParent(EntryCase):
    def run(self, model, x):
        x = model.first(x) + model.blocks[0].down.bias
        for block in model.blocks:
            x = block(x)
        return model.last(x @ model.blocks[1].up.weight.T @ model.blocks[2].up.weight)


class ParameterReadByASibling(EntryCase):
    class Unit(Block):
        def forward(self, x, other=None):
            return super().forward(x) + (0 if other is None else x @ other.up.weight.T @ self.down.weight.T)

    def run(self, model, x):
        x = model.first(x)
        for index, block in enumerate(model.blocks):
            x = block(x, other=model.blocks[index - 1])
        return model.last(x)


class ReturnsItsParameters(EntryCase):
    """A bias that the caller adds, and a view of a weight."""

    class Unit(Block):
        def forward(self, x):
            return super().forward(x), self.down.bias, self.up.weight.t()

    def pass_through(self, block, x):
        out, bias, weight = block(x)
        return out + bias + (x @ weight).sum(1, keepdim=True)


class AnotherMethod(EntryCase):
    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(self.run(model, x), y).backward()


class GradientPenalty(EntryCase):
    """Two losses of one gradient, one after the other."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        x.requires_grad_()
        score = squared(model(x), y)
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        slope.square().mean().backward(retain_graph=True)
        (slope.norm(dim=1).mean() + score).backward()


ENTRY_CASES = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, EntryCase) and value is not EntryCase
}
