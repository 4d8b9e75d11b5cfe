"""Other people's trainers on sharded models: one module each, which alone imports what it is for."""
