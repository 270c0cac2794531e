"""What sparse attention costs a model in quality, measured: suites of examples, their results file, and the search for a config."""
