"""Agents within a limit, in simulated time: what a machine would serve, by a model of its costs.

The host half is not simulated: tokendance's own scheduler plans every round and every step, with
as many pages as the machine's memory has room for. Only the device is replaced, by `cost`, which
says how long a forward pass takes. Other systems are planned by planners of their own (`systems`)
and pay by the same model. No model and no device is needed.
"""
