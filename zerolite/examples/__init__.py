"""Small training programs on public names, each runnable as `torchrun ... -m zerolite.examples.NAME`."""
