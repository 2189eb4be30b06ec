"""Decisions: pure functions of state, event and time that return what to do and why; no I/O of any
kind.
"""
