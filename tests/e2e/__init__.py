"""Real coordinators and real peers, as processes on loopback."""
