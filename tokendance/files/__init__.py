"""What outlives a process: a store's directory of page files and a catalogue.

`Directory` keeps rows and records, whole or not at all; `Durability` moves them between a store's
books and pool and its directory; `transfer` moves agents between stores.

May import: this package, `tokendance.host` and `tokendance.device`.
"""
