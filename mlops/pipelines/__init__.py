"""From raw data to a registered model: the steps of a training pipeline, and the gate before the registry."""
