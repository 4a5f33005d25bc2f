"""Deployment: the service, batch sampling, containers, clusters, monitoring."""
