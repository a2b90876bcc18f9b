"""Engines that call the library: thin examples of its public API.

May import: the front, `tokendance.host` and `tokendance.device`; nothing of the library imports it.
"""
