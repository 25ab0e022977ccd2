"""Every opportunistic decision, as one pure table."""
