"""One file per mechanism: its config, its module, its cache."""
