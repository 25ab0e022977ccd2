"""Other systems' configuration to oepy's: text in, manual SAs and policies out. No IO but through what is given."""
