"""From a leased chunk to micro-batches: fetch -> reader -> feed. Imports neither torch nor gRPC."""
