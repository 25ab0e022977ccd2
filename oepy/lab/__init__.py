"""The lab: a small Internet of network namespaces on this machine."""
