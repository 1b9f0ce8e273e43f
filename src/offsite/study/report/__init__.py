"""Collects the results of a study, and writes its tables, plots, contact sheets and report."""
