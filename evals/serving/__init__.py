"""Rounds of agents served for real, by OpenAI-compatible servers that are asked over HTTP.

`prompts` says what a round's agents ask, and hands out what they have written; `servers` starts and
stops the servers and reads their metrics; `front` is such a server over the small engine of
``examples``; `client` speaks to one of them; `rounds` lets societies of agents hold their rounds
through it; `figures` says what came of it, and `limits` how many agents a limit allows.

May import: anything of the repository; vLLM only by its process.
"""
