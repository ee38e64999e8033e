"""The `foveate` command line: one file per command, on top of train/, pruning/ and export/."""
