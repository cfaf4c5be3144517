"""One replica's K/V memory: what running requests hold, and the conversations whose K/V are kept."""

from collections import OrderedDict

BLOCK = 16  # tokens


class KvMemory:
    """Room for `capacity` tokens of K/V, in blocks. Kept conversations give way to requests, the least recent first.

    As in the engine (`runtime.kv`): a request finds the K/V of the same conversation, exact to the token; a
    conversation loses its last blocks first. Not as there: a request takes its answer's room when it starts, so none
    is preempted, and who gives way is the least recently used, not the one whose next use is expected last.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0  # tokens of running requests
        self.kept = 0
        self.conversations: OrderedDict[int, int] = OrderedDict()  # tokens kept, by conversation
        self.evicted = 0  # tokens
        self.changes: list[int] = []  # conversations of which more or less is kept, since they were taken

    def known(self, conversation: int, prompt: int) -> int:
        """How many tokens of a prompt need not be computed; the last one is, for its logits."""
        return min(self.conversations.get(conversation, 0), prompt - 1)

    def fits(self, tokens: int) -> bool:
        """Whether a request of so many tokens can start."""
        return self.held + rounded(tokens) <= self.capacity

    def take(self, conversation: int, tokens: int) -> None:
        """Take the room of a request that starts; what was kept of its conversation becomes the request's."""
        self.kept -= self.conversations.pop(conversation, 0)
        self.held += rounded(tokens)
        self._make_room()

    def give_back(self, conversation: int, tokens: int) -> None:
        """A request of so many tokens has ended: keep its K/V, which its last token has none of."""
        self.held -= rounded(tokens)
        self.kept += tokens - 1
        self.conversations[conversation] = tokens - 1
        self.changes.append(conversation)
        self._make_room()

    def _make_room(self) -> None:
        while self.held + self.kept > self.capacity:
            conversation, tokens = next(iter(self.conversations.items()))
            lost = min(tokens, rounded(self.held + self.kept - self.capacity))
            self.kept -= lost
            self.evicted += lost
            if lost == tokens:
                del self.conversations[conversation]
            else:
                self.conversations[conversation] = tokens - lost
            self.changes.append(conversation)

    def check(self) -> None:
        assert self.kept == sum(self.conversations.values()), "the tokens that are kept do not add up"
        assert 0 <= self.held + self.kept <= self.capacity


def rounded(tokens: int) -> int:
    """The tokens of whole blocks."""
    return -(-tokens // BLOCK) * BLOCK
