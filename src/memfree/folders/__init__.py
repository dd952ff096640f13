"""Output folders: atomic writes, locks, manifests, untrusted files."""
