"""Metrics of answers, benchmarks, comparisons."""
