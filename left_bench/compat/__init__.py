"""Uses of other packages' private interfaces, where there is no public one: one module for each package.

Imports only `core`. Every entry states why it is necessary, and has a test in tests/test_compat.py that fails when it
is no longer needed or no longer works. Any room above may use it.
"""
