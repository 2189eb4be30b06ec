"""`muster-peer`: one file per command; commands import what they need when they run, so that --help
stays quick.
"""
