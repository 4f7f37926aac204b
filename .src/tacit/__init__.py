"""Tacit: train on data that never leaves its owners, shrink the model, ship it with one privacy guarantee."""
