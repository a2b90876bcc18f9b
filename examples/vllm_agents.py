"""Six agents of AutoGen that talk all at once, through vLLM with tokendance inside.

AutoGen knows nothing of rounds: the server cuts prompts at the separator that is set, and computes
what the agents have both heard once. For AutoGen: pip install autogen-agentchat autogen-ext[openai]

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "TokenDanceConnector",
      "kv_role": "kv_both", "kv_connector_extra_config": {"separator": "<|im_end|>"}}'
    python vllm_agents.py [--url http://localhost:8000/v1] [--rounds 3]
"""

import argparse
import asyncio
import re
from urllib.request import urlopen

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import TextMessage
from autogen_core import CancellationToken
from autogen_ext.models.openai import OpenAIChatCompletionClient
from openai import OpenAI

PEOPLE = {
    "Ada": "keeps the mill and wants the square quiet in the morning",
    "Ben": "bakes, and needs carts on the square before six",
    "Cleo": "teaches, and would have a tree with a bench",
    "Dan": "drives the post coach through it twice a day",
    "Eve": "sells fish on it on Fridays",
    "Finn": "plays the fiddle there when it is warm",
}
MODEL = {
    "vision": False,
    "function_calling": False,
    "json_output": False,
    "structured_output": False,
    "family": "unknown",
}


def agents_of(url: str, tokens: int) -> dict[str, AssistantAgent]:
    """Each remembers what it was told and what it said."""
    name = OpenAI(base_url=url, api_key="none").models.list().data[0].id
    client = OpenAIChatCompletionClient(
        model=name, base_url=url, api_key="none", model_info=MODEL, temperature=0, max_tokens=tokens
    )
    return {
        who: AssistantAgent(
            who, client, system_message=f"You are {who}, who {what}. Answer in one sentence."
        )
        for who, what in PEOPLE.items()
    }


async def all_gather(agents: dict[str, AssistantAgent], said: dict[str, str]) -> dict[str, str]:
    """Everybody hears what all others said, in an order of its own, and answers."""

    async def answer(index: int, agent: AssistantAgent) -> str:
        order = [*said][index:] + [*said][:index]
        heard = [
            TextMessage(content=f"{who} says: {said[who]}", source=who)
            for who in order
            if who != agent.name
        ]
        response = await agent.on_messages(heard, CancellationToken())
        return response.chat_message.to_text().strip()

    answers = await asyncio.gather(*(answer(i, one) for i, one in enumerate(agents.values())))
    return dict(zip(agents, answers, strict=True))


def counted(url: str) -> dict[str, float]:
    """What the server has counted of rounds."""
    with urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r"^vllm:tokendance_(\w+)_total\{.*\} (\S+)", text, re.M)
    return {name: float(count) for name, count in found}


async def talk(url: str, rounds: int, tokens: int) -> None:
    agents = agents_of(url, tokens)
    said = {"Mayor": "What shall we do with the square?"}
    for number in range(rounds):
        before = counted(url)
        said = await all_gather(agents, said)
        print(f"round {number}:")
        for who, text in said.items():
            print(f"  {who}: {text}")
        more = {name: count - before.get(name, 0) for name, count in counted(url).items()}
        print(
            f"  {more['members']:.0f} agents in {more['rounds']:.0f} rounds: "
            f"{more['rows_computed']:.0f} of {more['rows']:.0f} prompt rows computed"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    options = parser.parse_args()
    asyncio.run(talk(options.url, options.rounds, options.tokens))


if __name__ == "__main__":
    main()
