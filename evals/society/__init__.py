"""A live society of agents: a small town that talks in All-Gather rounds on one KV cache.

- `Meeting`: who has said what, and the prompts that follow from it;
- `Society`: holds the meeting's rounds on a model;
- `RoundReport`: what a round was and cost;
- `Recompute`: how far its distributions are from full recompute.
"""

from evals.society.meeting import Meeting
from evals.society.options import Options
from evals.society.personas import PERSONAS, TOPICS, Persona
from evals.society.recompute import Comparison, Recompute
from evals.society.report import Block, PromptMap, RoundReport
from evals.society.simulation import Society

__all__ = [
    "PERSONAS",
    "TOPICS",
    "Block",
    "Comparison",
    "Meeting",
    "Options",
    "Persona",
    "PromptMap",
    "Recompute",
    "RoundReport",
    "Society",
]
