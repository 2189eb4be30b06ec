"""Checkpoints as safetensors files: written atomically, checked by digest, exported for
transformers.
"""
