"""Against the packages whose checkpoints are read and written; `make oracles` installs them."""
