"""Odd uses of autograd, each a model and what one rank does in one step.

The reference runs the ranks' parts one after another on one plain model and takes the mean of their gradients, as DDP.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from models import Block, Stack, joint_batch, llama, loss_of, part
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Quiet = Callable[[], AbstractContextManager]  # zerolite.no_sync(model); nothing in the reference


def data(rank: int, step: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return tuple(torch.randn(4, width, generator=generator, dtype=torch.float64) for width in (size, 3))


def squared(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum()


class Case:
    steps = 3
    same_units_on_every_rank = True  # stage 3 gathers a unit where it runs, so there this must hold

    def build(self) -> nn.Module:
        return Stack()

    def prepare(self, model: nn.Module) -> None:
        """Before sharding."""

    def groups(self, model: nn.Module):
        return model.parameters()

    def step(self, model: nn.Module, rank: int, step: int, quiet: Quiet) -> None:
        x, y = data(rank, step)
        squared(model(x), y).backward()


class Plain(Case):
    pass


class TiedLinear(Case):
    """Two modules own one parameter, in different blocks."""

    def build(self):
        model = Stack()
        model.blocks[2].up.weight = model.blocks[0].up.weight
        model.blocks[1].norm.bias = model.blocks[2].norm.bias
        return model


class TiedTransposed(Case):
    """An embedding is the output layer, in a loop over micro-batches."""

    def build(self):
        return llama(tied=True)

    def step(self, model, rank, step, quiet):
        batch = joint_batch("llama", step)
        for micro in range(2):
            loss_of(model, part(batch, 2 * rank + micro, 6)).backward()


class FrozenBlock(Case):
    def prepare(self, model):
        model.blocks[1].requires_grad_(False)
        model.first.bias.requires_grad_(False)


class FrozenButOne(Case):
    def prepare(self, model):
        model.requires_grad_(False)
        model.blocks[1].up.bias.requires_grad_(True)


class FrozenNotGiven(Case):
    """Only the trainable parameters are given to the optimizer."""

    def prepare(self, model):
        model.blocks[0].requires_grad_(False)

    def groups(self, model):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]


class TrainableNotGiven(Case):
    """The optimizer gets two of the blocks; the others have gradients and stay."""

    def groups(self, model):
        return [*model.blocks[0].parameters(), *model.blocks[2].parameters()]


class UnfrozenInput(Case):
    """A trainable block behind frozen ones: its inputs need no gradient."""

    def prepare(self, model):
        model.first.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
        model.blocks[1].requires_grad_(False)


class SkipsExperts(Case):
    """No gradient on some ranks, inside a unit: zeros count in the mean."""

    class Expert(Block):
        def __init__(self, width):
            super().__init__(width)
            self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

        def forward(self, x, expert=0):
            return super().forward(x) + self.experts[expert](x)

    class Model(Stack):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(SkipsExperts.Expert(7) for _ in range(3))

        def forward(self, x, experts=(0, 0, 0)):
            x = self.first(x)
            for block, expert in zip(self.blocks, experts, strict=True):
                x = block(x, expert=expert)
            return self.last(x)

    def build(self):
        return self.Model()

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(model(x, experts=(rank, 0, (rank + step) % 2)), y).backward()


class SkipsABlockOnOneRank(Case):
    """No gradient on some ranks for a whole unit, and its forward hooks do not run."""

    same_units_on_every_rank = False

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        x = model.first(x)
        for index, block in enumerate(model.blocks):
            if not (rank == 1 and index == 1):
                x = block(x)
        squared(model.last(x), y).backward()


class SkipsABlockInForward(Case):
    """The same, decided in forward from the data, and another block at each step."""

    same_units_on_every_rank = False

    class Model(Stack):
        def forward(self, x, skip=-1):
            x = self.first(x)
            for index, block in enumerate(self.blocks):
                if index != skip:
                    x = block(x)
            return self.last(x)

    def build(self):
        return self.Model()

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(model(x, skip=(rank + step) % 4), y).backward()


class BlockNeverUsed(SkipsABlockInForward):
    """No gradient on any rank: untouched, weight decay included; at its first gradient Adam's step is 1."""

    same_units_on_every_rank = True

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(model(x, skip=1 if step < 2 else 0), y).backward()


class ParameterNeverUsed(Case):
    """The same inside a block that is used."""

    def build(self):
        model = Stack()
        model.blocks[1].spare = nn.Linear(3, 3)
        return model


class OneRankHasNoLoss(Case):
    """A rank runs forward and backward on a sum of nothing."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        out = model(x)
        (squared(out, y) if rank == 0 else out.sum() * 0.0).backward()


class ModuleUsedTwice(Case):
    class Model(Stack):
        def forward(self, x):
            x = self.first(x)
            for block in [*self.blocks, self.blocks[0], self.blocks[1], self.blocks[0]]:
                x = block(x)
            return self.last(x)

    def build(self):
        return self.Model()


class ParameterUsedTwice(Case):
    """In a unit and in the root."""

    class Twice(Block):
        def forward(self, x):
            return super().forward(x) + self.norm.bias * self.norm.bias

    class Model(Stack):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(ParameterUsedTwice.Twice(7) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return self.last(x) + x @ self.last.weight.T

    def build(self):
        return self.Model()


class ZeroSize(Case):
    def build(self):
        model = Stack()
        model.blocks[0].nothing = nn.Parameter(torch.empty(0))
        model.nothing = nn.Parameter(torch.empty(3, 0))
        return model

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        (squared(model(x), y) + model.nothing.sum()).backward()


class Scalars(Case):
    """Parameters of one element, without dimensions."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.0))
            self.shift = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            return x[:, :3] * self.gain + self.shift

    def build(self):
        return self.Model()


class EmptyGroup(Case):
    def groups(self, model):
        return [{"params": []}, {"params": list(model.parameters()), "lr": 0.02}, {"params": []}]


class SeveralForwards(Case):
    def step(self, model, rank, step, quiet):
        (x, y), (u, v) = data(rank, step), data(rank, step + 50)
        (squared(model(x), y) + squared(model(u), v)).backward()


class ForwardsNested(Case):
    """Backwards in the order of the forwards, not the other way round."""

    def step(self, model, rank, step, quiet):
        (x, y), (u, v) = data(rank, step), data(rank, step + 50)
        first, second = squared(model(x), y), squared(model(u), v)
        first.backward()
        second.backward()


class SeveralBackwards(Case):
    def step(self, model, rank, step, quiet):
        for micro in range(3):
            x, y = data(rank, step + 50 * micro)
            squared(model(x), y).backward()


class RetainedGraph(Case):
    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        loss = squared(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()


class EvaluationBetween(Case):
    """A forward without gradients, between forward and backward."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        loss = squared(model(x), y)
        with torch.no_grad():
            model(x)
        loss.backward()


class QuietThenSync(Case):
    def step(self, model, rank, step, quiet):
        for micro in range(3):
            x, y = data(rank, step + 50 * micro)
            if micro < 2:
                with quiet():
                    squared(model(x), y).backward()
            else:
                squared(model(x), y).backward()


class QuietBackwardOnly(Case):
    """The forward outside no_sync."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        loss = squared(model(x), y)
        with quiet():
            loss.backward()
        squared(model(x), y).backward()


class QuietOnly(Case):
    """A step with no synchronising backward at all."""

    def step(self, model, rank, step, quiet):
        with quiet():
            for micro in range(2):
                x, y = data(rank, step + 50 * micro)
                squared(model(x), y).backward()


class QuietThenSyncOfAPart(SkipsABlockInForward):
    """The synchronising backward does not reach the block whose gradient waits."""

    same_units_on_every_rank = True

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        with quiet():
            squared(model(x, skip=0), y).backward()
        squared(model(x, skip=1), y).backward()


class Checkpointed(Case):
    class Model(Stack):
        reentrant = True
        order = (0, 1, 2)

        def forward(self, x):
            x = self.first(x)
            for index in self.order:
                x = checkpoint(self.blocks[index], x, use_reentrant=self.reentrant)
            return self.last(x)

    def build(self):
        return self.Model()


class CheckpointedNonReentrant(Checkpointed):
    class Model(Checkpointed.Model):
        reentrant = False


class SharedLayerCheckpointed(Checkpointed):
    """A layer twice inside reentrant checkpoints."""

    class Model(Checkpointed.Model):
        order = (0, 1, 0, 2, 1)


class SharedLayerCheckpointedNonReentrant(Checkpointed):
    class Model(Checkpointed.Model):
        order = (0, 1, 0, 2, 1)
        reentrant = False


class TwiceInOneCheckpoint(Checkpointed):
    """One reentrant checkpoint around a layer that runs twice, and around several layers."""

    class Model(Stack):
        def forward(self, x):
            x = self.first(x)
            x = checkpoint(lambda x: self.blocks[0](self.blocks[0](x)), x, use_reentrant=True)
            x = checkpoint(lambda x: self.blocks[2](self.blocks[1](x)), x, use_reentrant=True)
            return self.last(x)


class CheckpointedOutside(Case):
    """The whole model in a checkpoint, from outside."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(checkpoint(model, x.requires_grad_(), use_reentrant=True), y).backward()


class CheckpointedAndQuiet(Checkpointed):
    def step(self, model, rank, step, quiet):
        for micro in range(2):
            x, y = data(rank, step + 50 * micro)
            if micro == 0:
                with quiet():
                    squared(model(x), y).backward()
            else:
                squared(model(x), y).backward()


class DictOutput(Case):
    """Blocks and models that return dicts, tuples and None among tensors."""

    class Model(Stack):
        class Odd(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.block = block

            def forward(self, x, *, extra=None):
                out = self.block(x)
                return {"x": out, "more": (out.sum(), None, "text", [out * extra["scale"]])}

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(self.Odd(block) for block in self.blocks)

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                out = block(x, extra={"scale": 2.0})
                x = out["x"] + out["more"][3][0] + out["more"][0]
            return self.last(x), None

    def build(self):
        return self.Model()

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(model(x)[0] / 100, y).backward()


class PartOfTheOutputUnused(Case):
    """Only an early part of the model is under the loss: what comes after has run and gets nothing."""

    class Model(Stack):
        def forward(self, x):
            x = early = self.first(x)
            for index, block in enumerate(self.blocks):
                x = block(x)
                early = x if index == 0 else early
            return self.last(x), early

    def build(self):
        return self.Model()

    def step(self, model, rank, step, quiet):
        x, _ = data(rank, step)
        model(x)[1].square().sum().backward()


class InPlace(Case):
    """Blocks that change their input in place."""

    class Model(Stack):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x).mul_(1.5).add_(0.1)
            return self.last(x)

    def build(self):
        return self.Model()


class NoZeroGrad(Case):
    """Gradients stay between steps: the sum goes on."""


class ZeroGradToZeros(BlockNeverUsed):
    """set_to_none=False: zeros are gradients, and weight decay applies."""

    steps = 4

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(model(x, skip=1 if step in (1, 2) else -1), y).backward()


class ZeroGradOfTheModel(Case):
    pass


CASES = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, Case) and value is not Case
}
