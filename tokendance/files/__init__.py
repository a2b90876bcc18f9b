"""What outlives a process: the file that a store is saved in.

May import: this package, `tokendance.host` and `tokendance.device`.
"""
