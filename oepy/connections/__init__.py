"""Conventional connections: what the configuration says of them, and which one a peer belongs to. No IO."""
