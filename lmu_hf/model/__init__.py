"""Everything that travels with a checkpoint: the layer, the configuration, the models and the processors."""
