"""Benchmarks as they are released, made into data.json."""
