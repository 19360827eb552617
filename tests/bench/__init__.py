"""The benchmark: ``python -m tests.bench``.  The tests run it once, tiny, and time nothing."""
