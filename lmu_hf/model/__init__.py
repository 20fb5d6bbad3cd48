"""Everything that travels with a checkpoint."""
