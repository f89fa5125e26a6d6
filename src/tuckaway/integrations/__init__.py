"""tuckaway inside other libraries, each imported only when it is used: ``import tuckaway`` brings in none of them."""
