"""What is computed: pools of pages, rotation tables, operators.

May import: this package, and of `tokendance.host` the record of a step, what it is made of, and
what refuses to be copied.
"""
