"""Evaluation: metrics of answers, benchmarks, comparisons."""
