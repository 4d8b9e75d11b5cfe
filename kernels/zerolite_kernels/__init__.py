"""The room of the kernels: mechanism only, which knows nothing of zerolite and of torch.distributed."""
