"""Streaming generation: a scripted model answers, so that every way to end can be watched token by token."""
