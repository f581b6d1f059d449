"""What the benchmark scripts share: problems, timing, result files and the page that is made from them.

Nothing here is imported by the library. The scripts beside this folder import it by its short name, ``harness``.
"""
