"""Measurements as ratios within one run; each prints what it compared."""
