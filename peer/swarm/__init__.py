"""The swarm process: rounds, exact update, state transfer; the only package that imports
hivemind.
"""
