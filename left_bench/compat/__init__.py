"""What left_bench needs of other packages and they have no public door for: one module for each package.

Imports `core` alone. Every entry names what makes it necessary, and has a test in tests/test_compat.py that fails when
it is not needed any more, or no longer fits. A run passes through it wherever a room above meets such a place.
"""
