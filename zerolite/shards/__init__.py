"""What one rank holds: layouts, units, parameters, gradients, shards."""
