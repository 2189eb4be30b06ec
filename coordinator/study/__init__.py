"""Studies: sweeps of small runs on the swarm's own peers, from which laws are fitted.

Pure: designs and choices; the operations store and hand out.
"""
