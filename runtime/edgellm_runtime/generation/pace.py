"""How many tokens are worth drafting, by what came of drafts so far and by what checking them takes."""

from __future__ import annotations

__all__ = ["MOST_DRAFTED", "Pace"]

MOST_DRAFTED = 16
_FORGET = 0.9  # what is left of an observation after each further one
_PRIOR = (1.4, 2.0)  # of a kind that is new so many drafted tokens are taken to have been right, of so many
_PROBE = 20  # drafts that are not asked for before one is tried again, once they do not pay
_COSTS = (0.15, 0.03)  # of checking and of drafting a token, in plain steps, before any was measured
_EASE = 0.03  # how far they go back to that whenever they forbid a draft, or nothing would ever be measured again
_WORTH = 1.05  # a draft must promise so many times the tokens a second
_DEAREST = 1.0  # plain steps that a drafted token is believed to cost at most: a step may have waited for others
_DEARER, _CHEAPER = 0.1, 0.3  # how far such a cost moves towards one that was seen: waiting is no cost of drafts


class Pace:
    """The length of the next draft: the one that gives most tokens a second.

    With a chance ``a`` that a drafted token is right, a step over ``k`` of them gives ``1 + a + ... + a^k`` tokens, and
    takes ``1 + k c`` plain steps of time. Both ``a``, for each kind of draft, and ``c`` are measured as it goes.
    """

    def __init__(self) -> None:
        self._right: dict[str, tuple[float, float]] = {}  # of each kind: drafted tokens that were right, and all
        self._plain_s = 0.0
        self._checking, self._drafting = _COSTS[0], 0.0  # of one token, in plain steps
        self._passed: dict[str, int] = {}
        self._rate = 1.2  # tokens of a step over a draft, in those of as much time without

    def length(self, kind: str) -> int:
        """How many tokens to draft; 0: none, for it does not pay."""
        right, tried = self._right.get(kind, _PRIOR)
        chance = right / tried
        cost = self._checking + self._drafting
        best, most, given, share = 0, _WORTH, 1.0, 1.0
        for count in range(1, MOST_DRAFTED + 1):
            share *= chance
            given += share
            if given / (1 + count * cost) > most:
                best, most = count, given / (1 + count * cost)
        if best:
            return best
        self._ease()
        self._passed[kind] = self._passed.get(kind, 0) + 1
        return 2 if self._passed[kind] % _PROBE == 0 else 0

    def worth(self, chance: float) -> bool:
        """Whether one more token, right with such a chance, gives more tokens a second than drafts give by now."""
        if chance > (self._checking + self._drafting) * self._rate:
            return True
        self._ease()
        return False

    def _ease(self) -> None:
        costs = self._checking, self._drafting
        self._checking, self._drafting = (
            old - _EASE * max(old - usual, 0.0) for old, usual in zip(costs, _COSTS, strict=True)
        )

    def saw(self, kind: str, drafted: int, accepted: int) -> None:
        """Note how many of a draft's tokens were right; those behind the first wrong one tell nothing."""
        right, tried = self._right.get(kind, _PRIOR)
        self._right[kind] = right * _FORGET + accepted, tried * _FORGET + min(accepted + 1, drafted)
        self._rate = 0.95 * self._rate + 0.05 * (1 + accepted) / (1 + drafted * (self._checking + self._drafting))

    def took_plain(self, seconds: float) -> None:
        """Note the time of a step over one token."""
        self._plain_s = seconds if not self._plain_s else 0.9 * self._plain_s + 0.1 * seconds

    def took(self, tokens: int, checking: float, drafted: int, drafting: float) -> None:
        """Note the time of a step over several tokens.

        Args:
            tokens: it read.
            checking: its seconds.
            drafted: of the tokens, those that were drafted.
            drafting: the seconds of that.
        """
        if not self._plain_s or tokens < 2:
            return
        self._checking = _moved(self._checking, (checking / self._plain_s - 1) / (tokens - 1))
        if drafted:
            self._drafting = _moved(self._drafting, drafting / self._plain_s / drafted)


def _moved(old: float, seen: float) -> float:
    seen = min(max(seen, 0.0), _DEAREST)
    return old + (_DEARER if seen > old else _CHEAPER) * (seen - old)
