"""Held-out loss and text generation."""
