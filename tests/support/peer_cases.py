"""What FSDP2's and DeepSpeed's own suites try on a sharded model, in other words: cases as those of cases.py.

Hooks of users, parts called alone, models that are containers, reparametrizations, functional calls.
"""

from __future__ import annotations

import torch
from cases import Case, data, squared
from models import Block, Stack, drawn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


class PeerCase(Case):
    steps = 2
    stages: tuple[int, ...] = (1, 3)

    def after(self, model: nn.Module) -> None:
        """After sharding; with whole parameters where they are sharded."""


# Hooks of users #


class HookOnAGradient(PeerCase):
    """On parameters, before `shard` and after, and one that is there for a single backward."""

    def prepare(self, model):
        model.blocks[0].up.weight.register_hook(lambda gradient: gradient * 2)

    def after(self, model):
        model.blocks[1].up.weight.register_hook(lambda gradient: gradient * 3)

    def step(self, model, rank, step, quiet):
        hook = model.last.weight.register_hook(lambda gradient: gradient * 5)
        super().step(model, rank, step, quiet)
        hook.remove()


class HookBeforeTheEngines(PeerCase):
    """A hook on the accumulated gradient from before `shard` has this rank's own."""

    def prepare(self, model):
        def mask(parameter: Tensor) -> None:
            parameter.grad[::2] = 0

        model.first.weight.register_post_accumulate_grad_hook(mask)


class HookAfterTheEngines(PeerCase):
    """One from after `shard` may ask what every gradient knows, and clear it: here in the second of three steps."""

    steps = 3

    def after(self, model):
        def look(parameter: Tensor) -> None:
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == parameter.dtype
            if self.is_second:
                parameter.grad = None

        model.first.weight.register_post_accumulate_grad_hook(look)

    def step(self, model, rank, step, quiet):
        self.is_second = step == 1
        super().step(model, rank, step, quiet)


class HooksOnModules(PeerCase):
    def after(self, model):
        model.blocks[0].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 2,))
        model.blocks[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
        model.blocks[2].register_forward_hook(lambda module, args, output: output * 2)
        model.last.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


class HookOnSeveralGradients(PeerCase):
    def after(self, model):
        self.seen: list[int] = []
        torch.autograd.graph.register_multi_grad_hook(
            list(model.blocks[0].parameters()), lambda gradients: self.seen.append(len(gradients))
        )

    def step(self, model, rank, step, quiet):
        super().step(model, rank, step, quiet)
        assert set(self.seen) == {6}


# Parts and containers #


class Headless(Stack):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class HeadInChunks(PeerCase):
    """The loss calls the head, a part of the root, on pieces of what the model returned."""

    def build(self):
        return Headless()

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        sum(squared(model.last(part), t) for part, t in zip(model(x).chunk(2), y.chunk(2), strict=True)).backward()


class HeadInChunksOneByOne(HeadInChunks):
    """Each piece has its own backward, to a detached input; then the body has its own."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        hidden = model(x)
        cut = hidden.detach().requires_grad_()
        for part, target in zip(cut.chunk(2), y.chunk(2), strict=True):
            squared(model.last(part), target).backward()
        hidden.backward(cut.grad)


class ListAsRoot(PeerCase):
    """A container has no forward."""

    def build(self):
        return nn.ModuleList([nn.Linear(5, 7), Block(7), Block(7), nn.Linear(7, 3)])

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        for part in model:
            x = part(x)
        squared(x, y).backward()


class DictOfModels(PeerCase):
    def build(self):
        return nn.ModuleDict({"one": Stack(blocks=2), "other": Stack(blocks=2)})

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        (squared(model["one"](x), y) + squared(model["other"](x), 2 * y)).backward()


class ParametersInContainers(PeerCase):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.list = nn.ParameterList([torch.randn(5, 5) for _ in range(3)])
            self.dict = nn.ParameterDict({"out": nn.Parameter(torch.randn(5, 3))})

        def forward(self, x):
            for weight in self.list:
                x = torch.tanh(x @ weight)
            return x @ self.dict["out"]

    def build(self):
        return self.Model()


class NoInputs(PeerCase):
    class Model(Stack):
        def forward(self):
            x = self.first(torch.ones(2, 5, dtype=torch.float64))
            for block in self.blocks:
                x = block(x)
            return self.last(x)

    def build(self):
        return self.Model()

    def step(self, model, rank, step, quiet):
        (model().square().sum() * (1 + rank + step)).backward()


class NamesOfTheEngine(PeerCase):
    """Modules with attributes that a library may want for itself."""

    def prepare(self, model):
        for name in ("id", "name", "unit", "engine", "bucket", "index", "shard", "parameters_"):
            setattr(model, name, 1)
            setattr(model.blocks[0], name, "x")


class OddMemory(PeerCase):
    """A transposed parameter, one of a subclass, a convolution in channels_last."""

    class Model(Stack):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
            self.last.weight = nn.Parameter(torch.randn(7, 3).t())
            self.last.bias = Tagged(torch.randn(3))

        def forward(self, x):
            return super().forward(x) + self.conv(x[:1, 0].expand(1, 2, 3, 3)).flatten()

    def build(self):
        return self.Model()


class Tagged(nn.Parameter):
    pass


class NonScalarBackward(PeerCase):
    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        model(x).backward(y)


class TrainAndEval(PeerCase):
    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        model.eval()
        with torch.no_grad():
            target = model(x)
        model.train()
        squared(model(x), y + target).backward()


class Recurrent(PeerCase):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(3, 3)
            self.recurrent = nn.LSTM(4, 3, num_layers=2)

        def forward(self, x):
            return self.last(self.recurrent(self.first(x))[0])

    def build(self):
        return self.Model()

    def after(self, model):
        model.recurrent.flatten_parameters()


# Functional calls #


class CalledOnItsOwn(PeerCase):
    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), y).backward()


class CalledOnOthers(PeerCase):
    """A teacher's parameters in the same modules: Parameters, tensors, and a part of them."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        teacher = dict(drawn(self.build, seed=1).double().named_parameters())
        tensors = {name: parameter.detach() for name, parameter in teacher.items()}
        part = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.1")}
        with torch.no_grad():
            target = torch.func.functional_call(model, teacher, (x,))
        for parameters in (tensors, part):
            target = target + torch.func.functional_call(model, parameters, (x,)).detach()
        squared(model(x), y + target).backward()


class CalledOnFunctionsOfItsOwn(PeerCase):
    """Gradients go through what the values were computed from."""

    stages = (0, 2)

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        halved = {name: parameter * 0.5 for name, parameter in model.named_parameters()}
        squared(torch.func.functional_call(model, halved, (x,)), y).backward()


class Mapped(PeerCase):
    stages = (0, 2)

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(torch.func.vmap(lambda row: model(row[None])[0])(x), y).backward()


class Transformed(PeerCase):
    """Transforms of torch.func tell a number that weighs the loss: by inputs, by parameters, a row at a time."""

    stages = (0, 2)

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        func, own = torch.func, {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(parameters, rows):
            return func.functional_call(model, parameters, (rows,)).square().mean()

        by_parameters = func.grad(loss)(own, x)
        by_row = func.vmap(func.grad(lambda parameters, row: loss(parameters, row[None])), in_dims=(None, 0))(own, x)
        seen = [*by_parameters.values(), *by_row.values(), func.jacrev(model)(x), *func.jvp(model, (x,), (x,))]
        weight = sum(each.detach().square().mean() for each in seen)
        (squared(model(x), y) * weight).backward()


class DerivativesOfInputs(PeerCase):
    """Forward-mode tangents, a Jacobian and a product with a Hessian, all of it under the loss."""

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        with forward_ad.dual_level():
            out, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
            squared(out, y + tangent.detach()).backward()
        functional = torch.autograd.functional
        functional.jacobian(model, x, create_graph=True).square().mean().backward()
        _, product = functional.hvp(lambda rows: squared(model(rows), y), x, torch.ones_like(x), create_graph=True)
        product.square().mean().backward()


class CompiledFromOutside(PeerCase):
    stages = (3,)

    def after(self, model):
        self.compiled = torch.compile(model, backend="eager")

    def step(self, model, rank, step, quiet):
        x, y = data(rank, step)
        squared(self.compiled(x), y).backward()


# Reparametrizations #


def _seeded(reparametrize, module: nn.Module) -> None:
    torch.manual_seed(5)
    reparametrize(module)


class Reparametrized(PeerCase):
    """Before `shard`, in a unit and in the root, one way each."""

    ways = (weight_norm, parametrizations.weight_norm)

    def prepare(self, model):
        for way, module in zip(self.ways, (model.blocks[0].up, model.last), strict=True):
            _seeded(way, module.double())


class SpectralNorm(Reparametrized):
    """Its buffers move in every forward, each rank's alike."""

    ways = (spectral_norm, parametrizations.spectral_norm)

    def step(self, model, rank, step, quiet):
        buffers = dict(model.named_buffers())
        if rank == 0:
            self.before = {name: buffer.clone() for name, buffer in buffers.items()}
        elif hasattr(self, "before"):  # one process that plays every rank
            for name, buffer in buffers.items():
                buffer.copy_(self.before[name])
        super().step(model, rank, step, quiet)


class Pruned(Reparametrized):
    ways = (lambda module: prune.l1_unstructured(module, "weight", 0.5), parametrizations.orthogonal)


class PrunedAcross(PeerCase):
    def prepare(self, model):
        chosen = [(model.first, "weight"), (model.blocks[1].up, "weight"), (model.last, "bias")]
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.3)


class ReparametrizedLater(SpectralNorm):
    """What keeps the parameter under another name."""

    ways = ()

    def prepare(self, model):
        pass

    def after(self, model):
        prune.l1_unstructured(model.blocks[0].up, "weight", 0.5)
        _seeded(spectral_norm, model.blocks[1].up)
        _seeded(parametrizations.spectral_norm, model.blocks[2].up)
        _seeded(parametrizations.orthogonal, model.last)


class MadePermanentLater(SpectralNorm):
    def prepare(self, model):
        prune.l1_unstructured(model.blocks[0].up, "weight", 0.5)
        _seeded(parametrizations.spectral_norm, model.last)

    def after(self, model):
        prune.remove(model.blocks[0].up, "weight")
        torch.nn.utils.parametrize.remove_parametrizations(model.last, "weight")


PEER_CASES = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, PeerCase) and value is not PeerCase
}
