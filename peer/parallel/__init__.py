"""Devices of this machine and how a model is laid out on them."""
