"""Programs that a sampler proposes: it learns from every trial that has ended, in a copy of the study in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fuser.search.space import Point, Space

if TYPE_CHECKING:
    import optuna

_REPEATS = 200


@dataclass(frozen=True)
class Proposal:
    """A program to try, and the trial of the sampler that is told how it ended."""

    point: Point
    trial: optuna.Trial


class Proposals:
    """Asks a sampler for programs.

    The sampler works on a copy in memory: a proposal is dozens of writes, and the storage sees it as one.
    """

    def __init__(self, space: Space, sampler: optuna.samplers.BaseSampler | None) -> None:
        import optuna

        self.space = space
        self._mirror = optuna.create_study()
        if sampler is not None:
            self._mirror.sampler = sampler

    @property
    def repeats(self) -> bool:
        """Whether the sampler means to try programs again."""
        return bool(getattr(self._mirror.sampler, "repeats", False))

    def next(self, times: Mapping[str, float | None], pending: Collection[str]) -> Proposal:
        """A program that neither has a time (None: has failed) nor is pending, unless the sampler means to repeat.

        Raises ExhaustedError when there is none.
        """
        from fuser.search.samplers import ExhaustedError, suggest

        for _ in range(_REPEATS):
            trial = self._mirror.ask()
            try:
                point = suggest(trial, self.space)
            except ExhaustedError:
                self._mirror.tell(trial, state=_state("FAIL"))
                raise
            proposal, known = Proposal(point, trial), str(point)
            if self.repeats or (known not in times and known not in pending):
                return proposal
            self.end(proposal, times.get(known))
        raise ExhaustedError

    def end(self, proposal: Proposal, seconds: float | None = None) -> None:
        """How a proposal ended: with a time, or None for a failure."""
        self._mirror.tell(proposal.trial, seconds, state=None if seconds is not None else _state("FAIL"))

    def notes(self, proposal: Proposal) -> dict[str, Any]:
        """What the sampler wrote down with a proposal, which it reads again in other processes."""
        return dict(self._mirror.get_trials(deepcopy=False)[proposal.trial.number].system_attrs)

    def add(self, point: Point, seconds: float | None, notes: Mapping[str, Any]) -> None:
        """Let the sampler learn from a trial that it did not propose here."""
        import optuna

        params, distributions = parameters(self.space, point)
        self._mirror.add_trial(
            optuna.trial.create_trial(
                state=_state("COMPLETE" if seconds is not None else "FAIL"),
                value=seconds,
                params=params,
                distributions=distributions,
                user_attrs={"point": str(point)},
                system_attrs=dict(notes),
            )
        )


def parameters(space: Space, point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
    """A program as parameters of a trial, with their distributions."""
    from fuser.search.samplers import distributions, encode

    params = encode(space, point)
    known = distributions(space)
    return params, {name: known[name] for name in params}


def _state(name: str) -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState[name]
