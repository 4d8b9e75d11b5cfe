"""A region of a bucket as the host kernels see it: steps on tensors in an arena of its own."""

import math

import numpy as np
import torch
from zerolite_kernels import cpu
from zerolite_kernels.cpu import command as K

LIBRARY = cpu.load()  # None where no C++ compiler was found at install
PATHS = [path for path in (b"avx512", b"avx2", b"plain") if LIBRARY is not None and LIBRARY.zl_use(path) == 0]
BEST = PATHS[0] if PATHS else b""
if PATHS:
    LIBRARY.zl_use(BEST)

GRADIENTS = {K.FP32: torch.float32, K.BF16: torch.bfloat16, K.FP16: torch.float16, K.FP64: torch.float64}
LOW_PRECISION = {K.SPLIT_BF16: torch.bfloat16, K.MASTER_BF16: torch.bfloat16, K.MASTER_FP16: torch.float16}
LR, BETAS, EPS, DECAY, CLIP = 1e-2, (0.9, 0.99), 1e-8, 0.1, 0.5


class Region:
    """A region of `numel` elements in an arena of its own, at odd addresses, with canaries between the tensors.

    `run` does steps with the gradients that `gradient_of` gives; the runs are `pieces` of the region, each cut anew.
    """

    GAP = 61

    def __init__(self, rule, states, kind, gradient, numel, first=0, last=None, seed=0):
        self.rule, self.states, self.kind, self.gradient_dtype, self.numel = rule, states, kind, gradient, numel
        self.first, self.last = first, numel if last is None else last
        is_fp64 = kind == K.IN_PLACE_FP64
        full = torch.float64 if is_fp64 else torch.float32
        state = {K.STATES_FP32: full, K.STATES_BF16: torch.bfloat16, K.STATES_INT8: torch.uint8}[states]
        blocks, partials = -(-numel // K.BLOCK_NUMEL), -(-numel // K.PARTIAL_NUMEL)
        sizes = {
            "gradient": (GRADIENTS[gradient], numel),
            "parameter": (LOW_PRECISION.get(kind, full), numel),
            "master": (torch.int16 if kind == K.SPLIT_BF16 else torch.float32, numel if kind in LOW_PRECISION else 0),
            "exp_avg": (state, numel),
            "exp_avg_scale": (torch.float32, blocks),
            "exp_avg_sq": (state, numel),
            "exp_avg_sq_scale": (torch.float32, blocks),
            "result": (torch.float64, 2 * partials),
        }
        self.offsets, self.tensors, end = {}, {}, self.GAP
        for name, (dtype, count) in sizes.items():
            self.offsets[name], end = end, end + count * dtype.itemsize + self.GAP
        self.arena = np.full(end, 0xA5, np.uint8)
        for name, (dtype, count) in sizes.items():
            part = memoryview(self.arena)[self.offsets[name] :][: count * dtype.itemsize]
            self.tensors[name] = torch.frombuffer(part, dtype=dtype).zero_() if count else torch.zeros(0, dtype=dtype)
        self.step = 0
        self.load(initial(numel, seed).to(full))

    def load(self, full: torch.Tensor) -> None:
        """Set the parameter."""
        if self.kind == K.SPLIT_BF16:
            bits = full.view(torch.int32)
            self.tensors["parameter"].view(torch.int16).copy_((bits + 0x8000) >> 16)
            self.tensors["master"].copy_(bits)
        else:
            self.tensors["master" if self.kind in LOW_PRECISION else "parameter"].copy_(full)
            if self.kind in LOW_PRECISION:
                self.tensors["parameter"].copy_(full)

    def full(self) -> torch.Tensor:
        """The parameter in fp32, or fp64."""
        if self.kind == K.SPLIT_BF16:
            high, low = self.tensors["parameter"].view(torch.int16).int(), self.tensors["master"].int()
            return ((high << 16) + low).view(torch.float32)
        return self.tensors["master" if self.kind in LOW_PRECISION else "parameter"].clone()

    def state(self, name: str) -> torch.Tensor:
        if self.states != K.STATES_INT8:
            return self.tensors[name].to(torch.float64 if self.kind == K.IN_PLACE_FP64 else torch.float32)
        out = torch.zeros(self.numel)
        decode = getattr(LIBRARY, f"zl_decode_{name}")
        decode(self.tensors[name].data_ptr(), self.tensors[f"{name}_scale"].data_ptr(), out.data_ptr(), self.numel)
        return out

    def command(self, op=K.STEP, **changes) -> K.Command:
        t = max(self.step, 1)
        fields = {
            "op": op, "rule": self.rule, "states": self.states, "gradient_dtype": self.gradient_dtype,
            "parameter_kind": self.kind, "numel": self.numel, "first": self.first, "last": self.last, **self.offsets,
            "seed": 1000 + t, "position": 7, "multiplier": CLIP, "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1],
            "eps": EPS, "weight_decay": DECAY, "bias_correction1": 1 - BETAS[0] ** t,
            "bias_correction2_sqrt": math.sqrt(1 - BETAS[1] ** t), "trust_ratio": 1.0,
        }  # fmt: skip
        return K.Command(**(fields | changes))

    def do(self, command: K.Command, cuts=(), execute=None) -> None:
        if execute is not None:
            return execute(memoryview(self.arena), command, command.first, command.last)
        marks = [0, *cuts, max(self.numel, command.last)]
        for first, last in zip(marks, marks[1:], strict=False):
            assert LIBRARY.zl_execute(self.arena.ctypes.data, command, first, last) == 0

    def run(self, steps: int, cuts=(), execute=None, unused=slice(0, 0)) -> None:
        for _ in range(steps):
            self.step += 1
            self.tensors["gradient"].copy_(gradient_of(self.numel, self.step))[unused] = 0
            command = self.command()
            if self.rule == K.LAMB:
                command.op = K.PREPARE
                self.do(command, [cut // K.PARTIAL_NUMEL * K.PARTIAL_NUMEL for cut in cuts], execute)
                # Of the first partial block alone: any number will do here.
                squares = self.tensors["result"][:2].tolist()
                command.op, command.trust_ratio = K.STEP, math.sqrt(squares[0] / squares[1]) if squares[1] else 1.0
            self.do(command, cuts, execute)

    def bytes(self) -> bytes:
        return self.arena.tobytes()


def initial(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(numel: int, step: int) -> torch.Tensor:
    return 0.1 * torch.randn(numel, generator=torch.Generator().manual_seed(100 + step))
