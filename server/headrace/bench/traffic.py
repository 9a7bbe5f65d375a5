"""What a step needs of a protocol: clients that each wait for their answer before they ask again."""

from abc import ABC, abstractmethod

from headrace.bench.tally import Tally

PROBLEM_CHARACTERS = 160  # of a server's message; long ones tell no more and would not be counted together


class Traffic(ABC):
    """One request, written beforehand and sent again and again: a client that costs little hides no server."""

    @abstractmethod
    async def run(self, clients: int, tally: Tally) -> None:
        """Ask until the tally's window is over and every answer is there. Cancelling it drops what is under way."""

    @abstractmethod
    async def close(self) -> None:
        """End what ``run`` keeps between steps."""
