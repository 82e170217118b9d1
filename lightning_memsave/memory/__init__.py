"""Counting bytes: who holds them, at which moment. Needs torch only."""
