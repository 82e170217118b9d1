"""Strategies: how a run is spread over devices, in less memory."""
