"""The daemon: one asyncio process that joins the run and stands between coordinator, swarm process
and trainer.

daemon.py composes; membership (join, saved membership), dataset (cache), outbox (what the
coordinator has not acknowledged), coordinator_tasks (calls), children (processes and their
messages) and reports (numbers for people) are its parts. The session machine decides, the daemon
does. It imports neither torch nor hivemind.
"""
