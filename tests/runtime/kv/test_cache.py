import torch

from runtime.kv.cache import KvCache, KvCopy
from runtime.models.config import ModelConfig
from tests.runtime.adapter_format.adapter_files import MODEL

B = 4


def cache(model: ModelConfig = MODEL):
    made = KvCache(model, 6, B, torch.float32, torch.device("cpu"))
    for layer in made.layers:
        layer[B:].normal_()
    return made


def test_copies_take_a_block_on_every_layer_and_touch_no_others():
    kv = cache()
    before = [layer.clone() for layer in kv.layers]
    kv.copy([KvCopy(source=1, target=3), KvCopy(source=2, target=5)])
    for old, new in zip(before, kv.layers, strict=True):
        expected = old.clone()
        expected[3 * B : 4 * B] = old[B : 2 * B]
        expected[5 * B :] = old[2 * B : 3 * B]
        assert torch.equal(new, expected)


def test_block_0_stays_zero():
    kv = cache()
    kv.copy([KvCopy(source=1, target=2)])
    assert all(not layer[:B].any() for layer in kv.layers)
