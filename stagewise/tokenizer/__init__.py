"""Encoding text, and building and extending vocabularies."""
