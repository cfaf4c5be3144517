"""The fake engine's K/V: which blocks were computed for whom, and which prefixes are held."""

from typing import Literal

from runtime.messages import Event, Failed, Generate, HoldPrefix, KvNamespace, PrefixEnded, PrefixHeld

BLOCK = 16
Key = tuple[str, str, tuple[int, ...]]  # namespace, tenant, all tokens up to the block's end


def blocks(command: Generate | HoldPrefix) -> list[Key]:
    """A prompt's full blocks: the base's up to where the adapter begins, and all where its K/V are the base's."""
    tokens, found = tuple(command.token_ids), []
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        own = command.adapter is not None and not command.kv_is_base and end > command.invocation_start
        found.append((command.adapter or "" if own else "", command.cache_salt, tokens[:end]))
    return found


class FakeKv:
    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.computed: set[Key] = set()
        self.held: dict[str, HoldPrefix] = {}
        self.lookups: dict[str, tuple[int, int]] = {}  # by namespace: prompt tokens, and those found
        self.prompt_tokens = self.cached_tokens = 0

    def look_up(self, command: Generate | HoldPrefix) -> int:
        """How many tokens of a prompt need not be computed; the last one always is. Counts the prompt."""
        prompt, cached = len(command.token_ids), 0
        for key in blocks(command):
            if key not in self.computed or cached + BLOCK > prompt - 1:
                break
            cached += BLOCK
        of_base = prompt if command.adapter is None or command.kv_is_base else min(command.invocation_start, prompt)
        self._count("", of_base, min(cached, of_base))
        if command.adapter is not None and not command.kv_is_base:
            self._count(command.adapter, prompt - of_base, max(cached - of_base, 0))
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        return cached

    def _count(self, namespace: str, queries: int, hits: int) -> None:
        before = self.lookups.get(namespace, (0, 0))
        self.lookups[namespace] = before[0] + queries, before[1] + hits

    def compute(self, command: Generate | HoldPrefix) -> None:
        self.computed.update(blocks(command))

    def hold(self, command: HoldPrefix) -> list[Event]:
        script, count = command.cache_salt, -(-len(command.token_ids) // BLOCK)
        if script == "silent":
            return []
        refusal = script.split()[1] if script.startswith("refuse ") else None
        if command.prefix_id in self.held:
            refusal = "duplicate_prefix"
        elif self.blocks_held + count > self.num_blocks // 2:
            refusal = "prefixes_full"
        if refusal is not None:
            return [Failed(request_id=command.request_id, code=refusal, message="as scripted")]
        cached = self.look_up(command)
        self.compute(command)
        self.held[command.prefix_id] = command
        return [
            PrefixHeld(
                request_id=command.request_id,
                prefix_id=command.prefix_id,
                tokens=len(command.token_ids),
                blocks=count,
                cached_tokens=cached,
            )
        ]

    def release(self, prefix_id: str) -> None:
        self.held.pop(prefix_id, None)

    def drop(self, namespace: str | None, reason: Literal["dropped", "adapter_retired"]) -> list[Event]:
        self.computed = {key for key in self.computed if key[0] != (namespace or "")}
        ended = [prefix_id for prefix_id, command in self.held.items() if not self.computed.issuperset(blocks(command))]
        for prefix_id in ended:
            del self.held[prefix_id]
        return [PrefixEnded(prefix_id=prefix_id, reason=reason) for prefix_id in ended]

    def retire(self, digest: str) -> list[Event]:
        self.lookups.pop(digest, None)
        return self.drop(digest, "adapter_retired")

    @property
    def blocks_held(self) -> int:
        return sum(-(-len(command.token_ids) // BLOCK) for command in self.held.values())

    def namespaces(self) -> dict[str, KvNamespace]:
        used = {key for command in self.held.values() for key in blocks(command)}
        found = {}
        for name in {"", *self.lookups, *(key[0] for key in self.computed)}:
            of_it = {key for key in self.computed if key[0] == name}
            asked, hits = self.lookups.get(name, (0, 0))
            found[name] = KvNamespace(
                blocks_used=len(of_it & used), blocks_cached=len(of_it - used), query_tokens=asked, hit_tokens=hits
            )
        return found
