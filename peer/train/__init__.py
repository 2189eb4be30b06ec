"""The trainer process: a gradient engine that turns leased windows into contributions (loop.py is
THE loop).
"""
