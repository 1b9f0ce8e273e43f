"""Evaluation: loss, multiple choice, pictures, lm-eval, and intervals."""
