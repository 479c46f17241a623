"""What a run costs before it starts: bytes per rank, calls and bytes on the wire, seconds per step, and the best settings."""
