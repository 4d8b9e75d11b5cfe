"""The machine: devices, collectives, failure broadcast, host kernels; nothing here knows of ZeRO."""
