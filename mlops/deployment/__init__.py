"""The model outside the service: managed endpoints and small machines."""
