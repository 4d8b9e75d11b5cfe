"""What a worker runs where the host kernels were not built: torch's fused Adam and AdamW, else the reference."""

import math

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from zerolite_kernels.cpu import reference
from zerolite_kernels.cpu.command import ADAM, ADAMW, STATES_FP32, STEP, Command

CHUNK_NUMEL = 512 * 1024  # fp32 copies of gradient and parameter stay in a core's cache

torch.set_num_threads(1)  # a worker's thread is one core


def execute(memory: reference.Buffer, command: Command, first: int, last: int) -> None:
    """Elements [first, last) of a command, as `reference.execute`; agrees with it to 1e-6."""
    c = command
    if c.op != STEP or c.rule not in (ADAM, ADAMW) or c.states != STATES_FP32:
        reference.execute(memory, c, first, last)
        return
    arena = reference.Arena(memory, c)
    first, last = max(first, c.first), min(last, c.last)
    for begin in range(first, last, CHUNK_NUMEL):
        end = min(begin + CHUNK_NUMEL, last)
        parameter = reference.load_parameter(arena, begin, end)
        gradient = arena.gradient(begin, end).to(parameter.dtype, copy=True).mul_(c.multiplier)
        exp_avg, exp_avg_sq = reference.load_states(arena, begin, end)
        functional = adam if c.rule == ADAM else adamw
        functional(
            [parameter], [gradient], [exp_avg], [exp_avg_sq], [], [torch.tensor(step_of(c) - 1.0)],
            beta1=c.beta1, beta2=c.beta2, lr=c.lr, weight_decay=c.weight_decay, eps=c.eps,
            fused=True, amsgrad=False, maximize=False,
        )  # fmt: skip
        reference.store_parameter(arena, begin, end, parameter)


def step_of(command: Command) -> int:
    """The number of the step that the bias corrections belong to; a large one where both have become 1."""
    for beta, power in (
        (command.beta2, 1 - command.bias_correction2_sqrt**2),
        (command.beta1, 1 - command.bias_correction1),
    ):
        if 0 < beta < 1 and power > 1e-9:
            return round(math.log(power) / math.log(beta))
    return 1 if command.beta1 == command.beta2 == 0 else 1 << 20
