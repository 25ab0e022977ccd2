"""First packets: caught, held, and let go with a verdict."""
