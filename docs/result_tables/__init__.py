"""What docs/make_results_table.py writes: tables of results, and figures beside what was asked of them."""
