"""Whether peers can be reached: the coordinator dials back to the addresses that they announce."""
