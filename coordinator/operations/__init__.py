"""Operations: plain functions (tx, request, *, now_unix_seconds) run by the writer thread; domain
decides, store keeps.
"""
