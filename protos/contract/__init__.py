"""Code that both sides must compute identically; standard library, protobuf and numpy (grpc in
channel.py only).
"""
