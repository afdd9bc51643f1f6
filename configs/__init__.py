"""Experiment files, data only: each has a `get_config(arg)`."""
