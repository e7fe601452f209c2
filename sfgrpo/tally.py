"""What an iteration costs, counted where the work is done.

A row of the network is the unit: under classifier-free guidance a velocity takes two. What is done
twice counts twice, such as the first steps of a group that ranks share, and forwards that keep pace
with other ranks at ZeRO stage 3.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Tally:
    """This rank's counts; every part of the iteration adds to the same one."""

    velocity: int = 0
    """Network rows evaluated without gradient: sampling, clean estimates, the reference."""
    gradient: int = 0
    """Network rows evaluated with gradient: each is followed by its backward pass."""
    decoded: int = 0
    """Latents decoded."""
    scored: int = 0
    """Samples given to the rewards, all of them together."""
    scored_final: int = 0
    """Those of them that rewards of final images alone saw, too."""

    def counts(self) -> dict[str, int]:
        """By kind; that of rewards of final images alone only where there are such."""
        found = asdict(self)
        if not self.scored_final:
            del found["scored_final"]
        return found

    def rows(self, count: int, *, gradient: bool) -> None:
        """Count one forward of so many network rows."""
        if gradient:
            self.gradient += count
        else:
            self.velocity += count
