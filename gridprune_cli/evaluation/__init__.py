"""Evaluation: pruning methods on the same questions, scored as the public harnesses score."""
