"""What a user writes: stages, sources, the pipeline, and how a file of it is loaded."""
