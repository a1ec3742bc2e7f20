"""Pooled outputs: memory is reused only when nothing can read it any more."""

import gc

import torch

from lowrank.quant.pool import Pool
from lowrank.quant.tensor import QuantizedTensor

CPU = torch.device("cpu")


def test_a_dead_tensor_gives_its_memory_to_the_next() -> None:
    pool = Pool()
    a = pool.empty((1024, 512), torch.float32, CPU)
    where = a.data_ptr()
    b = pool.empty((1024, 512), torch.float32, CPU)
    assert b.data_ptr() != where
    del a
    assert pool.empty((2048, 512), torch.bfloat16, CPU).data_ptr() == where  # same bytes, another dtype
    assert b.data_ptr() != where


def test_views_and_aliases_keep_the_memory() -> None:
    for alias in (lambda t: t[3:5], lambda t: t.detach(), lambda t: t.view(-1)[:7], lambda t: t.T, lambda t: t.numpy()):
        pool = Pool()
        a = pool.empty((1024, 512), torch.float32, CPU).fill_(3)
        kept = alias(a)
        del a
        gc.collect()
        pool.empty((1024, 512), torch.float32, CPU).fill_(7)
        assert (kept == 3).all()


def test_a_graph_keeps_the_memory() -> None:
    pool = Pool()
    w = pool.empty((1024, 512), torch.float32, CPU).fill_(3)
    x = torch.ones(512, requires_grad=True)
    y = (w @ x).sum()
    del w
    pool.empty((1024, 512), torch.float32, CPU).fill_(7)
    y.backward()
    assert (x.grad == 3 * 1024).all()


def test_idle_memory_is_bounded() -> None:
    pool = Pool(limit=5 * 2**21)
    tensors = [pool.empty((2**21,), torch.uint8, CPU) for _ in range(9)]
    del tensors
    assert len(pool.idle) == 5
    pool.clear()
    assert not pool.idle


def test_small_tensors_bypass_the_pool() -> None:
    pool = Pool()
    pool.empty((10,), torch.float32, CPU)
    assert not pool.idle


def test_decoded_weights_do_not_share_memory_while_both_live() -> None:
    q = QuantizedTensor.quantize(torch.randn(1024, 1024), "nf4")
    a = q.dequantize()
    b = q.dequantize()
    assert a.data_ptr() != b.data_ptr() and torch.equal(a, b)
