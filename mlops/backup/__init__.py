"""Backups of weights, data splits and the audit log: made, kept for a while, verified and restored."""
