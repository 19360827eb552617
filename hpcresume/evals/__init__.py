"""Evaluation of a dataset with a workflow or an endpoint: every item on disk as it finishes."""

from hpcresume.evals.item import EvalItem

__all__ = ["EvalItem"]
