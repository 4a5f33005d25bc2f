"""What watches the data and the models."""
