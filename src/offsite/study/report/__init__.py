"""What a study writes: tables, plots, contact sheets and the report."""
