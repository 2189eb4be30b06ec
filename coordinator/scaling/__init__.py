"""Scaling laws: what a budget of compute buys, fitted from small runs.

Pure, on numpy: tables in, laws, forecasts and reasons out; no I/O, clock or log.
"""
