"""Keys in DNS: records, transport to one resolver, and the DNSSEC validator."""
