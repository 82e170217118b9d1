"""Precision plugins: which dtype weights and arithmetic have."""
