"""The built-in schemes: one file each, found by being here."""
