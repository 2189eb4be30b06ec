"""The operator's side: leases, ledger, directives and certificates; imports neither torch nor
hivemind.
"""
