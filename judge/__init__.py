"""Tools by which tests and benchmarks check the product (the package eagle3_ds): dense references, the
exactness matrix, mutations, ranks, counters, fault injection.
"""
