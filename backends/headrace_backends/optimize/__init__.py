"""The optimiser: finds the fastest form of a model that stays within its owner's accuracy budget, and proves it."""
