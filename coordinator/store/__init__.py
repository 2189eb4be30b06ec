"""The coordinator's durable memory: base.py says what holds, sqlite.py does it, migrations/ is the
schema.
"""
