"""Linear layers with LoRA: several projections of one input as one step of autograd. See linears.py."""

from zerolite_kernels.lora.linears import MAX_RANK, lora_linears

__all__ = ["MAX_RANK", "lora_linears"]
