"""Hugging Face folders: each rank reads its own slices of the safetensors, and writes stream a unit at a time."""

import json
import shutil
import uuid
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.core_model_loading import revert_weight_conversion

from zerolite.adapters.initial import settle_initial_values
from zerolite.api import build, check_arguments, engine_of, settle_buffers
from zerolite.checkpoint.folder import buffers_of
from zerolite.config import Offload, Precision
from zerolite.engine import meta_init as meta
from zerolite.engine.engine import Zero
from zerolite.errors import ZeroliteError
from zerolite.runtime import atomic_dir as files
from zerolite.runtime.mesh import groups_of
from zerolite.runtime.rank_errors import on_all_ranks
from zerolite.shards.units import UnitRule

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 2 << 30  # a file of an export, and so the host memory that writing it takes


def load_pretrained(
    path,
    stage: int,
    mesh: DeviceMesh | None = None,
    offload: Offload | str | None = None,
    precision: Precision | None = None,
    units: UnitRule | None = None,
    adapt: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Build a sharded model, in eval mode, from a local Hugging Face folder with safetensors. Collective.

    Arguments as of `shard`. adapt: called with the model before it is sharded, its parameters on the meta device, to
    freeze some or to add adapters: `adapt=zerolite.adapters.add_lora`. No rank builds the whole model: each reads its
    own ranges, and where full parameters stay (stages 0 to 2) ranks gather the rest from each other. ValueError where
    the folder has no weights, or others than the configuration asks for.
    """
    offload = check_arguments(stage, offload, precision)
    folder = Path(path)
    with _Weights(folder) as weights:
        model = _empty_model(folder)
        if adapt is not None:
            adapt(model)
        device = meta.target_device(model, mesh)
        zero = Zero(model, stage, *groups_of(mesh, device), device, precision)
        build(zero, units, offload, meta.leave_meta, has_values=False)
        _fill(zero, weights)
        for name, buffer in model.named_buffers():
            if name in weights.entries:
                weights.read(name, 0, buffer.numel(), buffer.data.view(-1))
    settle_buffers(zero)
    settle_initial_values(model)
    return model.eval()


def _empty_model(folder: Path) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    architectures = config.architectures or []
    cls = getattr(transformers, architectures[0], None) if architectures else None
    dtype = config.dtype or torch.float32

    def make() -> nn.Module:
        if cls is not None:
            return cls._from_config(config, dtype=dtype)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)

    model = meta.parameters_on_meta(make)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


class _Weights:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give a local Hugging Face model folder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give a local Hugging Face model folder")
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        elif (folder / INDEX).is_file():
            names = _indexed(folder / INDEX)
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        missing = [name for name in names if not (folder / name).is_file()]
        if not names or missing:
            what = f"misses {', '.join(missing[:4])}" if missing else "holds no safetensors weights"
            raise ValueError(
                f"{folder} {what}: download all of the model, or convert its pytorch_model.bin with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        self.folder = folder
        self.handles = [_open(folder / name) for name in names]
        self.entries = {key: handle for handle in self.handles for key in handle.keys()}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.__exit__(*exception)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.entries[key].get_slice(key).get_shape())

    def read(self, key: str, start: int, stop: int, out: torch.Tensor) -> None:
        """out (stop - start,) = elements [start, stop) of the flattened tensor; reads the rows that hold them."""
        if start == stop:
            return
        tensor, shape = self.entries[key].get_slice(key), self.shape(key)
        if not shape:
            out.copy_(self.entries[key].get_tensor(key).view(-1))
            return
        row_numel = 1
        for length in shape[1:]:
            row_numel *= length
        first, last = start // row_numel, -(-stop // row_numel)
        rows = tensor[first:last].reshape(-1)
        out.copy_(rows[start - first * row_numel : stop - first * row_numel])


def _fill(zero: Zero, weights: _Weights) -> None:
    """Read this rank's ranges, and gather the others' where full parameters stay. Collective."""
    keys = _keys_of(zero, weights)
    for unit in zero.units:
        for bucket in filter(lambda bucket: bucket.was_on_meta, unit.buckets):
            flat = bucket.flat
            low, high = bucket.layout.piece(zero.shard_group.rank)
            values = flat.values()
            mine = values[low - flat.start : high - flat.start]
            for slot in bucket.layout.slots:
                first, last = bucket.layout.overlap(slot, low, high)
                weights.read(keys[slot.name], first - slot.offset, last - slot.offset, mine[first - low : last - low])
            if flat.owns_all:
                everything = values.to(zero.device.device)
                zero.shard_group.all_gather(everything, everything[low:high], flat.label).wait()
                values = everything.to(values.device)
            flat.set_values(values)
            flat.republish()
            flat.wait()


def _keys_of(zero: Zero, weights: _Weights) -> dict[str, str]:
    """Parameter name -> name in the files: its own or a tied one's, with or without the base model's prefix."""
    model = zero.model
    prefix = getattr(model, "base_model_prefix", "")
    aliases: dict[str, list[str]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(names[id(parameter)], []).append(alias)
    keys: dict[str, str] = {}
    for unit in zero.units:
        for bucket in filter(lambda bucket: bucket.was_on_meta, unit.buckets):
            for slot in bucket.layout.slots:
                names = aliases[slot.name]
                candidates = [*names, *(f"{prefix}.{name}" for name in names)]
                candidates += [name.removeprefix(f"{prefix}.") for name in names]
                key = next((candidate for candidate in candidates if candidate in weights.entries), None)
                if key is None:
                    raise ValueError(
                        f"{weights.folder} holds no weights for {slot.name}: they are of another model than "
                        "config.json tells, or transformers converts them on load; then build the model with "
                        "from_pretrained and give it to zerolite.shard"
                    )
                if weights.shape(key) != slot.shape:
                    raise ValueError(
                        f"{key} in {weights.folder} has shape {weights.shape(key)}, config.json asks for {slot.shape}"
                    )
                keys[slot.name] = key
    known = {*keys.values(), *(alias for group in aliases.values() for alias in group), *dict(model.named_buffers())}
    unused = sorted(set(weights.entries) - known - {f"{prefix}.{name}" for name in known})
    if unused:
        warnings.warn(f"{weights.folder}: weights without a place: {', '.join(unused[:8])}", stacklevel=3)
    return keys


def _indexed(path: Path) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors files ({error}): download it again") from error


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): download it again") from error


@torch.no_grad()
def export(model: nn.Module, folder) -> None:
    """Write whole parameters as a Hugging Face folder, in their dtype; one that stood there is replaced. Collective.

    Rank 0 writes; at stage 3 one unit is gathered at a time, and a file (2 GiB) is held in host memory at most.
    `AutoModelForCausalLM.from_pretrained` opens the folder; tied weights stand once, under the name that transformers
    ties from. A model that is not of transformers gives its safetensors alone. Other files in the folder (a tokenizer)
    stay. ZeroliteError on every rank where rank 0 cannot write; what stood there then still stands. Adapters are left
    out: ValueError while one is on and not merged, since the folder would not be the model that runs.
    """
    zero = engine_of(model)
    adapters = getattr(model, "_zerolite_adapters", None)
    if adapters is not None and adapters.current is not None:
        raise ValueError(
            f"adapter {adapters.current.name!r} is on, and an export holds the base alone: call adapters.merge first, "
            "or adapters.save for the adapter, or export inside `with zerolite.adapters.disabled(model)`"
        )
    zero.settle()
    folder = Path(folder).resolve()
    together = partial(on_all_ranks, zero, f"exporting to {folder}", ZeroliteError)
    writer = _Writer(folder) if zero.rank == 0 else None
    together(lambda: writer.open() if writer is not None else None)
    buffers = buffers_of(model)
    try:
        for unit in zero.units:
            unit.unshard()
            unit.wait()
            together(lambda unit=unit: writer.add(model, _whole(model, unit)) if writer is not None else None)
            if zero.full_depth == 0:
                unit.reshard()
        together(lambda: writer.finish(model, buffers) if writer is not None else None)
    except ZeroliteError:
        zero.before_step()  # frees the unit that was gathered
        if writer is not None:
            writer.discard()
        raise


def _whole(model: nn.Module, unit) -> dict[str, torch.Tensor]:
    ties = getattr(model, "all_tied_weights_keys", {})
    return {
        ties.get(slot.name, slot.name): bucket.flat.full[slot.offset : slot.stop].view(slot.shape).to("cpu", copy=True)
        for bucket in unit.buckets
        if not bucket.stays_whole
        for slot in bucket.layout.slots
    }


class _Writer:
    """Files of a folder that appears when it is whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written = files.beside(folder, uuid.uuid4().hex[:12])
        self.pending: dict[str, torch.Tensor] = {}
        self.weight_map: dict[str, int] = {}
        self.total_bytes = 0
        self.num_files = 0

    def open(self) -> None:
        if self.folder.is_dir() and any(path.is_dir() for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds folders, which an export would remove: name another folder")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        files.restore(self.folder)
        files.remove_leftovers(self.folder)
        self.written.mkdir()

    def discard(self) -> None:
        shutil.rmtree(self.written, ignore_errors=True)

    def add(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        if isinstance(model, transformers.PreTrainedModel):
            tensors = revert_weight_conversion(model, tensors)
        self.pending.update({name: tensor.contiguous() for name, tensor in tensors.items()})
        if sum(tensor.nbytes for tensor in self.pending.values()) >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        self.num_files += 1
        path = self.written / f"part-{self.num_files}"
        save_file(self.pending, path, metadata={"format": "pt"})
        files.sync_file(path)
        self.weight_map.update(dict.fromkeys(self.pending, self.num_files))
        self.total_bytes += sum(tensor.nbytes for tensor in self.pending.values())
        self.pending = {}

    def finish(self, model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
        self.add(model, {name: buffer.cpu() for name, buffer in buffers.items()})
        self.flush()
        if self.num_files == 1:
            (self.written / "part-1").rename(self.written / SINGLE)
        else:
            names = [f"model-{n:05d}-of-{self.num_files:05d}.safetensors" for n in range(1, self.num_files + 1)]
            for number, name in enumerate(names, start=1):
                (self.written / f"part-{number}").rename(self.written / name)
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {key: names[number - 1] for key, number in sorted(self.weight_map.items())},
            }
            (self.written / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        if isinstance(model, transformers.PreTrainedModel):
            model.config.architectures = [type(model).__name__]
            model.config.dtype = next(iter(model.parameters())).dtype
            model.config.save_pretrained(self.written)
            if model.can_generate():
                model.generation_config.save_pretrained(self.written)
        self._keep_others()
        files.commit_folder(self.written, self.folder)

    def _keep_others(self) -> None:
        """Files that are not of the weights (a tokenizer) stay when a folder is replaced."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                is_weights = path.name.endswith(".safetensors") or path.name == INDEX
                if path.is_file() and not is_weights and not (self.written / path.name).exists():
                    shutil.copy2(path, self.written / path.name)
