"""The fake engine's K/V: which blocks were computed for whom, and which prefixes are held."""

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
        self.lookups: dict[str, tuple[int, int]] = {}

    def look_up(self, command: Generate | HoldPrefix) -> int:
        """How many tokens of a prompt need not be computed; the last one always is."""
        cached, limit = 0, len(command.token_ids) - 1
        for key in blocks(command):
            if key not in self.computed or cached + BLOCK > limit:
                break
            cached += BLOCK
        namespace = "" if command.kv_is_base else command.adapter or ""
        asked, hits = self.lookups.get(namespace, (0, 0))
        self.lookups[namespace] = asked + len(command.token_ids), hits + cached
        return cached

    def compute(self, command: Generate | HoldPrefix) -> None:
        self.computed.update(blocks(command))

    def hold(self, command: HoldPrefix) -> list[Event]:
        script, count = command.cache_salt, -(-len(command.token_ids) // BLOCK)
        if script == "silent":
            return []
        refusal = script.split()[1] if script.startswith("refuse ") else None
        if self.blocks_held + count > self.num_blocks // 2:
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

    def drop(self, namespace: str | None) -> list[Event]:
        self.computed = {key for key in self.computed if key[0] != (namespace or "")}
        over = [prefix_id for prefix_id, command in self.held.items() if command.adapter == namespace]
        for prefix_id in over:
            del self.held[prefix_id]
        return [PrefixEnded(prefix_id=prefix_id, reason="dropped") for prefix_id in over]

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
