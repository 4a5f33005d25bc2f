"""Ways to run a trained model elsewhere, and to release it."""
