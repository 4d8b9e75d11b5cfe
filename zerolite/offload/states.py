"""Optimizer states of one shard as the host keeps them: fp32, bf16 or int8 blocks; in the arena or on a drive.

    format   bytes an element            how it is rounded when a step writes it
    fp32     4                           not at all (fp64 parameters: 8 bytes of fp64)
    bf16     2                           stochastically, so that small changes add up
    int8     1 + 4 / 128                 stochastically; `exp_avg` by its block's largest, `exp_avg_sq` by its root

Decoded values encode to the very same bytes again, so a checkpoint in fp32 loses nothing of either format.
"""

import mmap
import weakref
from collections.abc import Mapping, Sequence

import torch
from zerolite_kernels import cpu
from zerolite_kernels.cpu import state_file
from zerolite_kernels.cpu.command import BLOCK_NUMEL, PARTIAL_NUMEL

from zerolite.config import master_dtype
from zerolite.offload.arena import SharedTensor
from zerolite.offload.host import Host
from zerolite.offload.shard_memory import ShardMemory

CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}


class HostStates:
    """One optimizer's states of one shard; their memory serves the next optimizer when this one is gone."""

    def __init__(self, host: Host, memory: ShardMemory, names: Sequence[str]):
        self.memory = memory
        layout, dtype = memory.layout, master_dtype(memory.dtype)
        self.encoded = {
            name: State(host, name, memory.numel, layout.shard_numel, dtype, memory.state_format) for name in names
        }

    def read(self, name: str) -> torch.Tensor:
        self.memory.wait()
        return self.encoded[name].read()

    def write(self, name: str, values: torch.Tensor) -> None:
        for gap in self.memory.layout.gaps:  # what padding was left with would spoil a block's scale
            gap.intersect(self.memory.range).of(values, self.memory.range).zero_()
        self.memory.wait()
        self.encoded[name].write(values)

    def resident(self) -> Mapping[str, torch.Tensor]:
        return {}


class State:
    """One of them: `numel` elements in shards of `shard_numel`; zeros at first."""

    def __init__(self, host: Host, name: str, numel: int, shard_numel: int, dtype: torch.dtype, format: str):
        """dtype: of the decoded values."""
        self.host, self.name, self.format, self.dtype = host, name, format, dtype
        self.numel, self.shard_numel = numel, shard_numel
        self.encoded_dtype = {"fp32": dtype, "bf16": torch.bfloat16, "int8": CODES[name]}[format]
        self.scale: SharedTensor | None = None  # fp32, one a block
        if format == "int8":
            self.scale = host.allocate(numel // BLOCK_NUMEL, torch.float32)
        self.memory: SharedTensor | None = None
        self.file_offsets: list[int] = []  # of each shard, where states lie on a drive
        if host.states_fd >= 0:
            width = self.encoded_dtype.itemsize
            num_shards = numel // shard_numel if shard_numel else 0
            self.file_offsets = [host.allocate_in_file(shard_numel, width) for _ in range(num_shards)]
            self._write_encoded(torch.zeros(numel, dtype=self.encoded_dtype))
        else:
            self.memory = host.allocate(numel, self.encoded_dtype)
        for shared in (self.scale, self.memory):
            if shared is not None:
                weakref.finalize(self, host.free_tensors[shared.key].append, shared)
        for offset in self.file_offsets:
            weakref.finalize(self, host.free_offsets[shard_numel, width].append, offset)

    @property
    def nbytes(self) -> int:
        scales = self.scale.values.nbytes if self.scale is not None else 0
        return self.numel * self.encoded_dtype.itemsize + scales

    def address(self, shard: int) -> int:
        """Bytes from the start of the arena, or of the file, to a shard's first element."""
        return self.file_offsets[shard] if self.memory is None else self.memory.address(shard * self.shard_numel)

    def scale_address(self, shard: int) -> int:
        return self.scale.address(shard * self.shard_numel // BLOCK_NUMEL) if self.scale is not None else 0

    def read(self) -> torch.Tensor:
        """(numel,) decoded; the memory itself where that is plain."""
        encoded = self._read_encoded()
        if self.scale is None:
            return encoded.to(self.dtype)
        values = torch.empty(self.numel, dtype=torch.float32)
        decode = getattr(cpu.load(), f"zl_decode_{self.name}")
        decode(encoded.data_ptr(), self.scale.values.data_ptr(), values.data_ptr(), self.numel)
        return values

    def write(self, values: torch.Tensor) -> None:
        """Encode (numel,) values, to the nearest."""
        values = values.to("cpu", self.dtype).contiguous()
        encoded = torch.empty(self.numel, dtype=self.encoded_dtype) if self.memory is None else self.memory.values
        if self.scale is not None:
            encode = getattr(cpu.load(), f"zl_encode_{self.name}")
            encode(values.data_ptr(), encoded.data_ptr(), self.scale.values.data_ptr(), self.numel)
        elif values.data_ptr() != encoded.data_ptr():
            encoded.copy_(values)
        if self.memory is None:
            self._write_encoded(encoded)

    def _read_encoded(self) -> torch.Tensor:
        if self.memory is not None:
            return self.memory.values
        encoded = torch.empty(self.numel, dtype=self.encoded_dtype)
        for offset, shard, buffer in self._shards(encoded):
            state_file.read(self.host.states_fd, memoryview(buffer), offset)
            shard.copy_(torch.frombuffer(buffer, dtype=shard.dtype, count=shard.numel()))
        return encoded

    def _write_encoded(self, encoded: torch.Tensor) -> None:
        for offset, shard, buffer in self._shards(encoded):
            torch.frombuffer(buffer, dtype=shard.dtype, count=shard.numel()).copy_(shard)
            state_file.write(self.host.states_fd, memoryview(buffer), offset)

    def _shards(self, encoded: torch.Tensor):
        """(offset in the file, its elements of `encoded`, a page-aligned buffer of whole pages) of every shard."""
        nbytes = -(-self.shard_numel // PARTIAL_NUMEL) * PARTIAL_NUMEL * encoded.element_size()
        for index, offset in enumerate(self.file_offsets):
            yield offset, encoded[index * self.shard_numel : (index + 1) * self.shard_numel], mmap.mmap(-1, nbytes)
