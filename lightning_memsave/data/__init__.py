"""What stands between a data set and the model: packs without contamination, batches of one length. Torch only."""
