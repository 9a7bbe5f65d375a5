"""What only a machine with a GPU can show: one command, ``python -m loadtests.gpu.run``."""
