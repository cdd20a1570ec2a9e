"""The commands of `sst-interp`: thin over the same functions a notebook calls."""
