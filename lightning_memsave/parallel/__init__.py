"""Mechanisms for several processes, on torch alone."""
