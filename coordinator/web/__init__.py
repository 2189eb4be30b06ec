"""Read-only page, JSON API and /metrics, in a thread and loop of their own so that no browser
delays a heartbeat.
"""
