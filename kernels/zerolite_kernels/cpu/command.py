"""One command to the host kernels, as it lies in memory shared by trainer and workers; mirrored in command.h.

A command works on elements [first, last) of a region. A region is one rank's shard of one bucket: `numel` elements, a
multiple of BLOCK_NUMEL. A caller may also step a loose tensor, of any length. Addresses are byte offsets of the
region's element 0 from a base: the arena's start in each process, or 0 for plain pointers. Imports neither torch nor
zerolite.

[Note: nothing depends on who computes]
Element i of a region gets the same bits whatever [first, last) it is computed in, on which path (AVX-512, AVX2, plain)
and by which thread. Blocks of int8 states and of partial sums lie on a grid from the region's element 0.
"""

import ctypes
import mmap
from collections.abc import Callable

BLOCK_NUMEL = 128  # elements that share one fp32 scale in int8 states; runs start at multiples of it
PARTIAL_NUMEL = 4096  # elements that share one fp64 partial sum; threads' shares are cut at multiples of it

# op
STEP = 1  # the rule's update; for LAMB the scaled direction, after PREPARE has updated the moments
PREPARE = 2  # LAMB: update the moments; result: a pair of fp64 sums of squares (parameter, direction) a partial block
ACCUMULATE = 3  # fp32 `parameter` = gradient (flag STORE) or += gradient
NORM = 4  # result: one fp64 sum of squares of the gradient a partial block; Inf and NaN stay what they are
FILL = 5  # `numel` bytes from `gradient` become zero, which also places their pages

# rule
ADAM, ADAMW, LION, LAMB = 1, 2, 3, 4

# states
STATES_FP32, STATES_BF16, STATES_INT8 = 0, 1, 2  # with parameter FP64, STATES_FP32 means fp64

# dtypes of a gradient
FP32, BF16, FP16, FP64 = 0, 1, 2, 3

# how the parameter is kept
IN_PLACE_FP32 = 0  # `parameter`: fp32
IN_PLACE_FP64 = 1  # `parameter`: fp64, gradient and states too
SPLIT_BF16 = 2  # `parameter`: bf16, nearest to the master, ties away from zero; `master`: its 16 missing bits
# As torch and DeepSpeed keep it, two bytes an element more than SPLIT_BF16, which tests and benchmarks compare with it.
# The engine keeps no parameter so.
MASTER_BF16 = 3  # `master`: fp32; `parameter`: its bf16 copy, ties to even
MASTER_FP16 = 4  # `master`: fp32; `parameter`: its fp16 copy, ties to even

STORE = 1  # flag


class Command(ctypes.Structure):
    """Fields that an op does not use are 0."""

    _fields_ = [
        ("op", ctypes.c_uint32),
        ("rule", ctypes.c_uint32),
        ("states", ctypes.c_uint32),
        ("gradient_dtype", ctypes.c_uint32),
        ("parameter_kind", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("numel", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("gradient", ctypes.c_uint64),
        ("parameter", ctypes.c_uint64),
        ("master", ctypes.c_uint64),
        ("exp_avg", ctypes.c_uint64),
        ("exp_avg_scale", ctypes.c_uint64),  # int8 states: fp32, one a block of the region
        ("exp_avg_sq", ctypes.c_uint64),
        ("exp_avg_sq_scale", ctypes.c_uint64),
        ("result", ctypes.c_uint64),  # fp64, entry 0 is of the partial block that `first` lies in
        ("seed", ctypes.c_uint64),  # of stochastic rounding, another one each step
        ("position", ctypes.c_uint64),  # of the region's element 0 in its bucket, for stochastic rounding
        ("multiplier", ctypes.c_double),  # of the gradient: clip factor and loss scale
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("bias_correction1", ctypes.c_double),  # 1 - beta1 ** step
        ("bias_correction2_sqrt", ctypes.c_double),  # sqrt(1 - beta2 ** step)
        ("trust_ratio", ctypes.c_double),  # LAMB
        ("file", ctypes.c_uint64),  # 1: exp_avg and exp_avg_sq are offsets in the file of states, not in the arena
    ]


assert ctypes.sizeof(Command) == 208

Execute = Callable[[mmap.mmap, Command, int, int], None]  # elements [first, last) of a command on the arena
