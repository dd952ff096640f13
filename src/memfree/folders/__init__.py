"""Folders that commands write: one writer, whole or not there, and what made them."""
