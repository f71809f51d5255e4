"""A Plan on a board: a C project (export), the protocol that it speaks (link), and boards that are emulated."""
