"""The volunteer's side: a daemon, one swarm process, trainer processes."""
