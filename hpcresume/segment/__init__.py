"""Immutable published files: chunk frames, and the container with a verified footer."""
