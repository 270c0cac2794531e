"""Broken checkpoints, prompts, flags, arrays and configs: each is refused in one sentence that says what to do instead.

A row says how to provoke the fault, the exit code (or exception), and words that the sentence must hold: the value, and the
rule or the way out. Nothing may be printed on stdout, and nothing on disk may change. (A disk that fills up while
converting is in tests/model/test_gguf_refusals.py.)
"""
