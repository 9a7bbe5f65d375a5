"""The changes that the optimiser can make to a model's file, one a module; ``registry`` knows them by name."""
