"""What came out: measures, scores, intervals, judges, comparisons and the report."""
