"""Ways to run a trained model elsewhere."""
