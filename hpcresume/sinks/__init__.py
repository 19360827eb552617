"""Encoding of what the last stage produces, in the workers."""
