"""The product of groups of rows, each by its own matrix of a stack: mixtures of experts."""
