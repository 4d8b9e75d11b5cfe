"""One optimizer state of one bucket as the host keeps it: fp32, bf16 or int8 blocks; in the arena or on a drive.

    format   bytes an element            how it is rounded when a step writes it
    fp32     4                           not at all (fp64 parameters: 8 bytes of fp64)
    bf16     2                           stochastically, so that small changes add up
    int8     1 + 4 / 128                 stochastically; `exp_avg` by its block's largest, `exp_avg_sq` by its root

Decoded values encode to the very same bytes again, so a checkpoint in fp32 loses nothing of either format.
"""

import mmap
import weakref

import torch
from zerolite_kernels import cpu
from zerolite_kernels.cpu import state_file
from zerolite_kernels.cpu.command import BLOCK_NUMEL, PARTIAL_NUMEL

from zerolite.offload.arena import Field
from zerolite.offload.host import Host

CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}


class State:
    """`numel` elements in pieces of `piece_numel`; zeros at first."""

    def __init__(self, host: Host, name: str, numel: int, piece_numel: int, dtype: torch.dtype, format: str):
        """dtype: of the decoded values."""
        self.host, self.name, self.format, self.dtype = host, name, format, dtype
        self.numel, self.piece_numel = numel, piece_numel
        self.encoded_dtype = {"fp32": dtype, "bf16": torch.bfloat16, "int8": CODES[name]}[format]
        self.scale: Field | None = None  # fp32, one a block
        if format == "int8":
            self.scale = host.allocate(numel // BLOCK_NUMEL, torch.float32)
        self.field: Field | None = None
        self.file_offsets: list[int] = []  # of each piece, where states lie on a drive
        if host.states_fd >= 0:
            width = self.encoded_dtype.itemsize
            num_pieces = numel // piece_numel if piece_numel else 0
            self.file_offsets = [host.allocate_in_file(piece_numel, width) for _ in range(num_pieces)]
            self._write_encoded(torch.zeros(numel, dtype=self.encoded_dtype))
        else:
            self.field = host.allocate(numel, self.encoded_dtype)
        for field in (self.scale, self.field):
            if field is not None:
                weakref.finalize(self, host.free_fields[field.key].append, field)
        for offset in self.file_offsets:
            weakref.finalize(self, host.free_offsets[piece_numel, width].append, offset)

    @property
    def nbytes(self) -> int:
        scales = self.scale.values.nbytes if self.scale is not None else 0
        return self.numel * self.encoded_dtype.itemsize + scales

    def address(self, piece: int) -> int:
        """Bytes from the start of the arena, or of the file, to a piece's first element."""
        return self.file_offsets[piece] if self.field is None else self.field.address(piece * self.piece_numel)

    def scale_address(self, piece: int) -> int:
        return self.scale.address(piece * self.piece_numel // BLOCK_NUMEL) if self.scale is not None else 0

    def read(self) -> torch.Tensor:
        """(numel,) decoded; the memory itself where that is plain."""
        encoded = self._read_encoded()
        if self.format != "int8":
            return encoded.to(self.dtype)
        values = torch.empty(self.numel, dtype=torch.float32)
        decode = getattr(cpu.load(), f"zl_decode_{self.name}")
        decode(encoded.data_ptr(), self.scale.values.data_ptr(), values.data_ptr(), self.numel)
        return values

    def write(self, values: torch.Tensor) -> None:
        """Encode (numel,) values, to the nearest."""
        values = values.to("cpu", self.dtype).contiguous()
        encoded = torch.empty(self.numel, dtype=self.encoded_dtype) if self.field is None else self.field.values
        if self.format == "int8":
            encode = getattr(cpu.load(), f"zl_encode_{self.name}")
            encode(values.data_ptr(), encoded.data_ptr(), self.scale.values.data_ptr(), self.numel)
        elif values.data_ptr() != encoded.data_ptr():
            encoded.copy_(values)
        if self.field is None:
            self._write_encoded(encoded)

    def _read_encoded(self) -> torch.Tensor:
        if self.field is not None:
            return self.field.values
        encoded = torch.empty(self.numel, dtype=self.encoded_dtype)
        for offset, piece, buffer in self._pieces(encoded):
            state_file.read(self.host.states_fd, memoryview(buffer), offset)
            piece.copy_(torch.frombuffer(buffer, dtype=piece.dtype, count=piece.numel()))
        return encoded

    def _write_encoded(self, encoded: torch.Tensor) -> None:
        for offset, piece, buffer in self._pieces(encoded):
            torch.frombuffer(buffer, dtype=piece.dtype, count=piece.numel()).copy_(piece)
            state_file.write(self.host.states_fd, memoryview(buffer), offset)

    def _pieces(self, encoded: torch.Tensor):
        """(offset in the file, its elements of `encoded`, a page-aligned buffer of whole pages) of every piece."""
        nbytes = -(-self.piece_numel // PARTIAL_NUMEL) * PARTIAL_NUMEL * encoded.element_size()
        for index, offset in enumerate(self.file_offsets):
            yield offset, encoded[index * self.piece_numel : (index + 1) * self.piece_numel], mmap.mmap(-1, nbytes)
