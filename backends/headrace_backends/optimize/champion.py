"""The fastest form so far, whose process stays in memory: what is cut is cut beside it."""

from contextlib import ExitStack

from headrace_backends.optimize.clocking import Runner


class Champion:
    """``runner`` is None until there is one, and once it was let go; ``speedup`` over the reference is kept then."""

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.speedup = 1.0
        self._open = ExitStack()

    def crown(self, runner: Runner, speedup: float, held: ExitStack) -> None:
        """Keep this one from now on, and end the one before. ``held`` would end its process, and is taken over."""
        self._open.close()
        self._open = held.pop_all()
        self.runner, self.speedup = runner, speedup

    def let_go(self) -> None:
        """End its process; how fast it was is still known."""
        self._open.close()
        self.runner = None

    def forget_if_dead(self) -> None:
        """Where its process is dead the reference is the one to beat."""
        if self.runner is not None and not self.runner.alive:
            self.let_go()
            self.speedup = 1.0
