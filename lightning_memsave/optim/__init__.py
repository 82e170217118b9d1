"""Optimizers with small state, and the swap that keeps groups, schedulers and resume. Needs torch only."""
