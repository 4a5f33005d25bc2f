"""The service: brains over HTTP."""
