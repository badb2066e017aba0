"""The architectures, one file each, and the protocol that any model follows."""
