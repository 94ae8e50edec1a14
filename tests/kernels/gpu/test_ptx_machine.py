"""The machine that the GPU kernels are tested on finds what it is there to find."""

import re

import numpy as np
import pytest
import torch
from kernel_cases import Layer
from ptx_machine.arithmetic import float8_of_floats, halves_of_float8, lop3, permuted, transposed_matrix
from ptx_machine.driver import MachineDriver
from ptx_machine.machine import Launch, Program
from ptx_machine.report import DeviceError
from triton.runtime import driver

from spark_kernels import gpu

HEADER = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 in,
	.param .u64 .ptr .global .align 1 out
)
.reqntid 64
{
	ld.param.b64 %rd1, [in];
	ld.param.b64 %rd2, [out];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	shl.b32 %r2, %r1, 2;
"""


def _launch(body: str, source: torch.Tensor, out: torch.Tensor, grid=(1, 1, 1), shared_bytes: int = 256, **options):
    params = {name: np.full((1, 1, 1), t.data_ptr(), "u8") for name, t in (("in", source), ("out", out))}
    program = Program.of(f"{HEADER}{body}\tret;\n}}\n")
    return Launch(program, grid, params, [source, out], shared_bytes, **options).run()


def _buffers(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(2**30, (count,), dtype=torch.int32), torch.zeros(count, dtype=torch.int32)


COPY = "ld.global.b32 %r3, [%rd4];\nst.global.b32 [%rd5], %r3;\n"
# Threads give what they have to the other warp.
EXCHANGE = """
	ld.global.b32 %r3, [%rd4];
	st.shared.b32 [%r2], %r3;
	bar.sync 0;
	xor.b32 %r4, %r2, 128;
	ld.shared.b32 %r5, [%r4];
	st.global.b32 [%rd5], %r5;
"""


@pytest.mark.parametrize("order", ["lockstep", "random", "alone"])
def test_what_a_barrier_orders(order):
    source, out = _buffers()
    report = _launch(EXCHANGE, source, out, order=order)
    assert torch.equal(out, source.roll(32))
    assert not report.races and report.barriers == 2


@pytest.mark.parametrize("order", ["lockstep", "random", "alone"])
def test_a_race_in_shared_memory(order):
    report = _launch(EXCHANGE.replace("bar.sync 0;", ""), *_buffers(), order=order)
    assert report.races and "shared" in report.described_races()[0]


def test_an_order_that_no_barrier_keeps_changes_the_result():
    wrong = 0
    for seed in range(4):
        source, out = _buffers()
        _launch(EXCHANGE.replace("bar.sync 0;", ""), source, out, order="alone", seed=seed)
        wrong += not torch.equal(out, source.roll(32))
    assert wrong


def test_a_race_between_ctas():
    """Two CTAs store different values; the same value twice is harmless, and counted apart."""
    source, out = _buffers()
    store = "mov.u32 %r3, %ctaid.x;\nst.global.b32 [%rd5], %r3;\n"
    assert _launch(store, source, out, grid=(2, 1, 1)).races
    report = _launch(COPY, source, source.clone(), grid=(2, 1, 1))
    assert not report.races and report.same_value


def test_a_race_between_reader_and_writer():
    source, _ = _buffers()
    in_place = (
        "xor.b64 %rd6, %rd3, 128;\nadd.s64 %rd7, %rd1, %rd6;\nld.global.b32 %r3, [%rd7];\nst.global.b32 [%rd5], %r3;\n"
    )
    assert _launch(in_place, source, source).races


def test_bounds_and_alignment():
    source, out = _buffers(63)
    with pytest.raises(DeviceError, match=r"outside every tensor: ld\.global"):
        _launch(COPY, source, out)
    shifted = COPY.replace("[%rd4]", "[%rd4+2]")
    with pytest.raises(DeviceError, match="not a multiple of 4"):
        _launch(shifted, torch.zeros(80, dtype=torch.int32), torch.zeros(80, dtype=torch.int32))
    with pytest.raises(DeviceError, match="outside 128 bytes"):
        _launch(EXCHANGE, *_buffers(), shared_bytes=128)


def test_what_was_never_written_is_poison():
    source, out = _buffers()
    _launch("ld.shared.b32 %r3, [%r2];\nst.global.b32 [%rd5], %r3;\n", source, out)
    assert (out == -1).all()
    _launch("st.global.b32 [%rd5], %r77;\n", source, out.zero_())
    assert (out == -1).all()


def test_a_copy_arrives_when_it_is_waited_for():
    body = "cp.async.ca.shared.global [%r2], [%rd4], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;\n"
    body += "ld.shared.b32 %r3, [%r2];\nst.global.b32 [%rd5], %r3;\n"
    source, out = _buffers()
    _launch(body, source, out)
    assert torch.equal(out, source)
    _launch(body.replace("wait_group 0", "wait_group 1"), source, out)
    assert (out == -1).all()


@pytest.mark.parametrize("text", ["bar.sync 1, 32", "wgmma.fence.sync.aligned", "atom.global.add.u32 %r3, [%rd5], 1"])
def test_what_it_cannot_run_it_names(text):
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        _launch(f"{text};\n", *_buffers())


def test_counts():
    report = _launch(COPY, *_buffers())
    load = report.total("ld.global")
    assert (load.requests, load.lanes, load.bytes, load.sectors, load.lines) == (2, 64, 256, 8, 2)
    assert report.instructions["ld.global.b32"] == 2 and report.warps == 2
    apart = "mul.wide.u32 %rd6, %r1, 32;\nadd.s64 %rd7, %rd1, %rd6;\nld.global.b32 %r3, [%rd7];\n"
    load = _launch(apart, *_buffers(512)).total("ld.global")
    assert (load.sectors, load.lines) == (64, 16)
    conflicts = "shl.b32 %r6, %r1, 3;\nld.shared.b32 %r3, [%r6];\n"
    load = _launch(conflicts, *_buffers(), shared_bytes=512).total("ld.shared")
    assert (load.passes, load.ideal) == (4, 2)


def test_arithmetic():
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 2**32, (3, 1, 1, 32), dtype="u4")
    assert np.array_equal(permuted(a, b, 0x7610), (a & 0xFFFF) | (b & 0xFF000000) | ((b & 0xFF0000) >> 16 << 16))
    selector = np.full((1, 1, 1), 0x3210 ^ 0x00F0, "u4")
    assert np.array_equal(
        permuted(a, b, selector), permuted(a, b, 0x32E0 ^ 0x3010 ^ 0x3010 ^ (0x32E0 ^ int(selector.item())))
    )
    assert np.array_equal(lop3(a, b, c, 0xEA), (a & b) | c)
    x = np.concatenate([rng.normal(size=30) * 100, [1e-4, 1e6]]).astype("f4").reshape(1, 1, 32)
    as_bytes = float8_of_floats(x, x)
    expected = torch.from_numpy(x.clip(-448, 448)).to(torch.float8_e4m3fn)
    assert np.array_equal(as_bytes & 255, expected.view(torch.uint8).numpy())
    halves = halves_of_float8(as_bytes)[..., None].view("f2")
    assert np.array_equal(halves[..., 0], expected.to(torch.float16).numpy())
    assert np.array_equal(transposed_matrix(transposed_matrix(a)), a)


def _decode(monkeypatch, drop: int | None) -> tuple[list[str], int]:
    """Races of a decode whose split kernel lacks the barrier number ``drop``; and its number of barriers."""
    count = 0

    def mutated(text: str) -> Program:
        nonlocal count
        if "entry _decode_split" in text:
            barriers = list(re.finditer(r"bar\.sync\s+0;", text))
            count = len(barriers)
            if drop is not None:
                text = text[: barriers[drop].start()] + text[barriers[drop].end() :]
        return Program.of(text)

    machine = MachineDriver(89, counts=False)
    monkeypatch.setattr(MachineDriver, "programs", {})
    monkeypatch.setattr("ptx_machine.driver.Program", type("Mutated", (), {"of": staticmethod(mutated)}))
    monkeypatch.setattr(driver, "_active", machine)
    torch.manual_seed(0)
    layer = Layer.random("3 bits", "int4", head_dim=128, num_kv_heads=1, lengths=(200,))
    plan = gpu.DecodePlan.build(layer.indptr, layer.slots, 1)
    gpu.decode_attention(layer.q[:1], layer.rows, plan, sm_scale=layer.sm_scale, logits_soft_cap=0.0, v_scale=1.0)
    return machine.races, count


def test_every_dropped_barrier_of_decode_is_found(monkeypatch):
    races, count = _decode(monkeypatch, None)
    assert not races and count
    missed = [drop for drop in range(count) if not _decode(monkeypatch, drop)[0]]
    assert not missed
