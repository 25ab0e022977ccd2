"""X.509 for IKE (RFC 5280, RFC 4945): certificates, paths, identities, revocation. Without IO."""
