"""Engines that call the library: thin examples of its public API."""
