"""One file per provider, each imported on demand by `open_session`."""
