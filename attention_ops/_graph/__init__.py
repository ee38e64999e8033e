"""Bodies of the ops for exporters and compilers: plain differentiable torch, by standard operations.

Tokens are copied as contiguous rows, by `index_select`. The indices are constants where the size of a map is known, and
operations on its symbols where an exporter leaves it free; both are right for every size.
"""
