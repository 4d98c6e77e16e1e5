"""Simulated clusters: the real code of the engines in one thread, with a virtual clock and a seed."""
