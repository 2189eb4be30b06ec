"""gRPC border: thin aio servicers over operations. Nothing here decides; wire.py converts, auth.py
knows the caller.
"""
