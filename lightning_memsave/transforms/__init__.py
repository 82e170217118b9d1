"""Changes of a model, in place and reversible. Needs torch only."""
