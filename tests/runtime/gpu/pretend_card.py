"""A GPU's memory without a GPU: what torch.cuda says of it, as the engine asks."""

from dataclasses import dataclass, field

import torch

from runtime.gpu.card import Card


@dataclass
class PretendCard:
    """`calls` are the functions of torch.cuda that were called, in order."""

    total: int
    free: int  # before the engine takes any
    weights: int  # taken when the engine asks again
    peaks: list[int]  # of the runs that are measured, in order
    reserved: int = 7
    calls: list[str] = field(default_factory=list)

    def install(self, monkeypatch):
        """The card, as the engine sees it."""
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None, name=name: self.calls.append(name))
        monkeypatch.setattr(torch.cuda, "mem_get_info", self._info)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", self._peak)
        return Card(torch.device("cpu"))

    def _info(self, device):
        asked_before = "mem_get_info" in self.calls
        self.calls.append("mem_get_info")
        return (self.free - self.weights if asked_before else self.free), self.total

    def _peak(self, device):
        self.calls.append("max_memory_reserved")
        return self.reserved + self.peaks.pop(0)
