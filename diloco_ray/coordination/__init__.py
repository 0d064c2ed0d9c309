"""Decisions only: pure functions of state and event. No tensors, clock, randomness, threads or I/O."""
