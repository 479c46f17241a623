"""What tests and benchmarks judge the product with: dense references, exactness matrix, mutations, ranks,
counters, faults.
"""
