"""The library of the host kernels: loaded in milliseconds, called by several threads and with plain pointers."""

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from regions import LIBRARY, Region, gradient_of
from zerolite_kernels.cpu import command as K

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the host kernels were not built: no C++ compiler at install")


def test_a_worker_loads_in_milliseconds():
    """What a worker process does: no torch, no numpy, no zerolite, and no time to speak of."""
    code = """
import sys, time
start = time.perf_counter()
from zerolite_kernels import cpu
library = cpu.load()
took = time.perf_counter() - start
assert library.zl_path() in (b"avx512", b"avx2", b"plain")
assert not {"torch", "numpy", "zerolite"} & set(sys.modules), sorted(sys.modules)
print(took)
"""
    took = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.1


def test_threads_share_a_command():
    """Calls release the GIL and hold no state: four threads on parts of one command give the bytes of one call."""

    regions = [Region(K.ADAMW, K.STATES_INT8, K.SPLIT_BF16, K.BF16, 2**18) for _ in range(2)]
    for region in regions:
        region.step = 1
        region.tensors["gradient"].copy_(gradient_of(region.numel, 1))
    regions[0].do(regions[0].command())
    command, base, part = regions[1].command(), regions[1].arena.ctypes.data, 2**14
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda i: LIBRARY.zl_execute(base, command, i * part, (i + 1) * part), range(16))
        assert list(answers) == [0] * 16
    assert regions[0].bytes() == regions[1].bytes()


def test_plain_pointers_and_addresses_that_wrap():
    """Base 0 means pointers; element 0 may lie outside memory, as long as the range does not."""
    region = Region(K.ADAMW, K.STATES_FP32, K.IN_PLACE_FP32, K.FP32, 1000)
    region.tensors["gradient"].copy_(gradient_of(1000, 1))
    expected = Region(K.ADAMW, K.STATES_FP32, K.IN_PLACE_FP32, K.FP32, 1000)
    expected.tensors["gradient"].copy_(gradient_of(1000, 1))
    expected.do(expected.command())
    shift = 10**6  # element 0 lies this many elements before the tensors
    addresses = {
        name: (tensor.data_ptr() - shift * tensor.element_size()) % 2**64 for name, tensor in region.tensors.items()
    }
    command = region.command(numel=shift + 1000, first=shift, last=shift + 1000, **addresses)
    assert LIBRARY.zl_execute(None, command, 0, 2**63) == 0
    assert region.bytes() == expected.bytes()
    assert ctypes.sizeof(command) == LIBRARY.zl_command_bytes()
