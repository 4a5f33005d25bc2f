"""The routes, each file with those that belong together."""
