"""Devices: what a machine is, what fits on it, and what it measures about itself."""
