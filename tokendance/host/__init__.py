"""What is decided: prompts in, step records out.

Segments and their digests, which rows are reused and which are computed (`decide`), who uses which
page (`books`), the life of a round (`plan`), what a step computes (`record`), the gate's accounts.
numpy and the C++ planner only: no torch, no device, no clock. The same calls give the same bytes
everywhere.

May import: this package and `tokendance._planner`.
"""
