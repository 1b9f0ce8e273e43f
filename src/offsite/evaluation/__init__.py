"""Scores of a model: loss, multiple choice, pictures and lm-evaluation-harness, with confidence intervals."""
