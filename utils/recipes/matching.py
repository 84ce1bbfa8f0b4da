"""Which filters of a list a tensor's name holds, in time that does not grow with the length of the list.

mergekit takes the first filter that is a plain substring of the name. Trying each costs filters times names, which a mixture
with a filter for each expert has 18,000 of. Here substrings of the name are looked up: only where one begins as some filter
does, and only those as long as a filter that begins so.
"""

from collections.abc import Sequence


class FilterList:
    """Filters in the order of a recipe, `""` being one that every name holds; of equal ones the first counts.

    Args:
        texts: the filters.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._places: dict[str, int] = {}
        for place, text in enumerate(texts):
            self._places.setdefault(text, place)
        self._head = min((len(text) for text in self._places if text), default=0)
        lengths: dict[str, set[int]] = {}
        for text in self._places:
            if text:
                lengths.setdefault(text[: self._head], set()).add(len(text))
        self._lengths = lengths

    def held(self, name: str) -> set[str]:
        """The filters that are substrings of a name."""
        found = {""} if "" in self._places else set()
        if not self._head:
            return found
        for start in range(len(name) - self._head + 1):
            for length in self._lengths.get(name[start : start + self._head], ()):
                text = name[start : start + length]  # cut short at the end of the name it may be a shorter filter
                if text in self._places:
                    found.add(text)
        return found

    def place(self, name: str) -> int | None:
        """The place of the filter that mergekit applies to a name, None if the name holds none."""
        return min((self._places[text] for text in self.held(name)), default=None)
