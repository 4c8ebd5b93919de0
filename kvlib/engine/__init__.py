"""Decode under a KV budget: slots, the step, the round, sampling, and rows that come and go."""
