"""Pure functions over arrays: the mathematics. One folder per operation, reference beside fast."""
