"""The host kernels' library, built at install time: where it lies and what it offers.

Imports neither torch nor zerolite. The library is optional: without a compiler at install time there is none.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from zerolite_kernels.cpu.command import Command

_SIGNATURES = {
    # Elements [first, last) of a command. 0: done; else nothing was written, and 1: no such operation, 2: the states
    # lie in a file, 3: a range that cuts a block of int8 states.
    "zl_execute": (ctypes.c_int, [ctypes.c_void_p, ctypes.POINTER(Command), ctypes.c_uint64, ctypes.c_uint64]),
    # The path in use, b"avx512", b"avx2" or b"plain"; choose another one (nonzero where this CPU lacks it).
    "zl_path": (ctypes.c_char_p, []),
    "zl_use": (ctypes.c_int, [ctypes.c_char_p]),
    # int8 states to and from fp32: codes, scales, fp32, numel, from the start of a block; encoding rounds to nearest.
    "zl_decode_exp_avg": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]),
    "zl_decode_exp_avg_sq": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]),
    "zl_encode_exp_avg": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]),
    "zl_encode_exp_avg_sq": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]),
    "zl_command_bytes": (ctypes.c_size_t, []),
}


def path() -> Path | None:
    """The built library, None where the install could not build it."""
    candidates = [Path(__file__).with_name("_kernels" + suffix) for suffix in EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.exists()), None)


def load() -> ctypes.CDLL | None:
    """The library with its signatures set, None where there is none. Calls release the GIL."""
    found = path()
    if found is None:
        return None
    library = ctypes.CDLL(str(found))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.zl_command_bytes() != ctypes.sizeof(Command):
        raise ImportError(f"{found.name} was built from other sources than these: run `pip install -e .` again")
    return library
