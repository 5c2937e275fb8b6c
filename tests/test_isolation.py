"""Tenants never meet: a row depends on its own input and its own adapters, on nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux


def layer(ranks: tuple[int, ...] = (3, 8, 5)) -> tuple[lora_mux.MuxLinear, list[int]]:
    made = lora_mux.MuxLinear(nn.Linear(16, 12))
    handles = [
        made.add_adapter(f"a{i}", torch.randn(r, 16), torch.randn(12, r), alpha=4)
        for i, r in enumerate(ranks)
    ]
    return made, handles


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_neighbours_inputs_change_no_bit(poison: float) -> None:
    mux, (a, b, c) = layer()
    index = torch.tensor([[a, b], [b, c], [-1, -1], [a, b], [c, -1], [a, -1]])
    x = torch.randn(6, 16)
    clean = mux(x, lora_mux.Routing(index))
    for bad in range(6):
        poisoned = x.clone()
        poisoned[bad] = poison
        got = mux(poisoned, lora_mux.Routing(index))
        rest = [row for row in range(6) if row != bad]
        assert torch.equal(got[rest], clean[rest])


@pytest.mark.usefixtures("each_form")
def test_a_neighbours_weight_changes_no_bit() -> None:
    mux, (a, b, _) = layer()
    x, index = torch.randn(2, 16), torch.tensor([[a, b], [a, b]])
    clean = mux(x, lora_mux.Routing(index, torch.ones(2, 2)))
    loud = mux(x, lora_mux.Routing(index, torch.tensor([[1.0, 1.0], [3e38, -3e38]])))
    assert torch.equal(loud[0], clean[0])


def test_another_rows_adapter_that_overflows_changes_no_bit() -> None:
    """Its h for this row is infinite. It must be left out by selecting, because inf * 0 is NaN."""
    mux, (a, *_) = layer()
    huge = mux.add_adapter("huge", torch.full((2, 16), 3e38), torch.ones(12, 2), alpha=1)
    x = torch.full((3, 16), 9.0)
    clean = mux(x, lora_mux.Routing(torch.tensor([[a], [-1], [a]])))
    got = mux(x, lora_mux.Routing(torch.tensor([[a], [-1], [huge]])))
    assert torch.equal(got[:2], clean[:2]) and got[2].isinf().all()


@pytest.mark.usefixtures("each_form")
def test_permuted_rows_give_permuted_outputs() -> None:
    mux, handles = layer()
    index = torch.tensor([*handles, -1])[torch.randint(0, 4, (9, 2))]
    x, order = torch.randn(9, 16), torch.randperm(9)
    torch.testing.assert_close(
        mux(x[order], lora_mux.Routing(index[order])), mux(x, lora_mux.Routing(index))[order]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["A", "B", "bias"])
def test_adapters_that_are_not_finite_are_refused(part: str, value: float) -> None:
    mux, _ = layer()
    parts = {"A": torch.ones(2, 16), "B": torch.ones(12, 2), "bias": torch.ones(12)}
    parts[part].view(-1)[3] = value
    with pytest.raises(lora_mux.LoraMuxError, match=rf"{part}.*finite"):
        mux.add_adapter("bad", alpha=1, **parts)  # type: ignore[arg-type]
    assert "bad" not in mux.adapters


class TestHandles:
    def test_a_freed_handle_raises_and_its_slot_serves_another(self) -> None:
        mux, (a, b, c) = layer()
        x = torch.randn(1, 16)
        old = lora_mux.Routing(torch.tensor([[b]]))
        mux.remove_adapter("a1")
        with pytest.raises(lora_mux.LoraMuxError, match="removed"):
            mux(x, old)
        new = mux.add_adapter("tenant", torch.ones(8, 16), torch.ones(12, 8), alpha=1)
        assert new not in (a, b, c)
        with pytest.raises(lora_mux.LoraMuxError, match="removed"):
            mux(x, old)
        assert not torch.equal(mux(x, lora_mux.Routing(torch.tensor([[new]]))), mux(x))

    def test_the_same_name_again_is_another_handle(self) -> None:
        mux, (a, *_) = layer()
        mux.remove_adapter("a0")
        assert mux.add_adapter("a0", torch.ones(3, 16), torch.ones(12, 3), alpha=1) != a

    def test_handles_are_never_used_twice(self) -> None:
        mux = lora_mux.MuxLinear(nn.Linear(2, 2))
        seen = set()
        for i in range(500):
            handle = mux.add_adapter(f"{i}", torch.ones(1, 2), torch.ones(2, 1), alpha=1)
            assert handle not in seen and 0 <= handle < 2**31
            seen.add(handle)
            if i % 3:
                mux.remove_adapter(f"{i}")

    def test_a_slot_out_of_generations_is_given_up(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("lora_mux.core.slots.GENERATIONS", 2)
        mux = lora_mux.MuxLinear(nn.Linear(2, 2))
        handles = []
        for i in range(5):
            handles.append(mux.add_adapter(f"{i}", torch.ones(1, 2), torch.ones(2, 1), alpha=1))
            mux.remove_adapter(f"{i}")
        assert len(set(handles)) == 5 and len({h & 0xFFFF for h in handles}) == 3

    @pytest.mark.parametrize("handle", [3, 7, 8, 9, 65535, 65536, 1 << 20, 2**31 - 1, 2**62])
    def test_handles_that_were_never_given_out(self, handle: int) -> None:
        mux, _ = layer()
        index = torch.tensor([[0, -1], [1, handle]])
        with pytest.raises(lora_mux.LoraMuxError, match=rf"index\[1, 1\].*{handle}"):
            mux(torch.randn(2, 16), lora_mux.Routing(index))

    def test_a_route_of_names_outlived_by_its_adapter_raises(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        mux = lora_mux.attach(model)
        pair = (torch.ones(1, 4), torch.ones(4, 1))
        mux.add_adapter("a", {"0": pair}, alpha=1)
        x = torch.ones(2, 4)
        mux.set_adapter("a")
        mux.remove("a")
        with pytest.raises(lora_mux.LoraMuxError, match="removed"):
            model(x)
        mux.add_adapter("tenant", {"0": pair}, alpha=1)
        with pytest.raises(lora_mux.LoraMuxError, match="removed"):
            model(x)
        mux.set_adapter(None)
        with mux.route(["tenant", None]):
            assert mux.active_adapters == ["tenant"]
            mux.remove("tenant")
            assert mux.active_adapters == []
            with pytest.raises(lora_mux.LoraMuxError, match="removed"):
                model(x)


class TestPool:
    """Exact ranks: rank rows follow each adapter's own rank, and are used again."""

    def used(self, mux: lora_mux.MuxLinear) -> dict[int, tuple[int, int]]:
        return {slot: (span.offset, span.rows) for slot, span in mux.mux_pool.spans.items()}

    def test_rows_are_exact_and_disjoint(self) -> None:
        mux, _ = layer((3, 8, 5, 1, 40))
        spans = sorted(self.used(mux).values())
        assert [rank for _, rank in spans] == [3, 8, 5, 1, 40]
        assert [offset for offset, _ in spans] == [0, 3, 11, 16, 17]

    def test_freed_rows_are_used_again_by_what_fits(self) -> None:
        mux, _ = layer((3, 8, 5))
        mux.remove_adapter("a1")
        mux.add_adapter("big", torch.ones(9, 16), torch.ones(12, 9), alpha=1)
        mux.add_adapter("small", torch.ones(6, 16), torch.ones(12, 6), alpha=1)
        assert sorted(self.used(mux).values()) == [(0, 3), (3, 6), (11, 5), (16, 9)]

    def test_freed_rows_hold_nothing_of_their_tenant(self) -> None:
        mux, _ = layer((3, 8))
        mux.remove_adapter("a1")
        assert not mux.mux_pool.A_rows[3:11].any() and not mux.mux_pool.B_rows[3:11].any()

    def test_a_slots_next_tenant_has_no_part_of_the_last(self) -> None:
        """The next tenant leaves layer 0 alone, where the last one had rank rows."""
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        mux = lora_mux.attach(model)
        pair = (torch.ones(2, 4), torch.ones(4, 2))
        last = mux.add_adapter("last", {"0": pair, "1": pair}, alpha=2)
        mux.remove("last")
        next_ = mux.add_adapter("next", {"1": pair}, alpha=2)
        assert last & 0xFFFF == next_ & 0xFFFF
        mux.add_adapter("other", {"0": pair}, alpha=2)  # takes the rank rows that were freed
        x = torch.ones(1, 4)
        with mux.route(["next"]):
            got = model[0](x)
        assert torch.equal(got, model[0](x))

    def test_a_tenant_after_a_biased_one_has_no_bias(self) -> None:
        mux = lora_mux.MuxLinear(nn.Linear(4, 4))
        mux.add_adapter("b", torch.ones(1, 4), torch.ones(4, 1), alpha=1, bias=torch.ones(4))
        mux.remove_adapter("b")
        a = mux.add_adapter("a", torch.ones(2, 4), torch.ones(4, 2), alpha=2)
        x = torch.zeros(1, 4)
        assert torch.equal(mux(x, lora_mux.Routing(torch.tensor([[a]]))), mux(x))

    def test_churn_keeps_every_adapter_right(self) -> None:
        """Adapters come and go; those that stay keep answering as they did alone."""
        mux = lora_mux.MuxLinear(nn.Linear(6, 5, bias=False))
        x = torch.randn(1, 6)
        want: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(1)
        for step in range(200):
            if want and torch.rand((), generator=generator) < 0.45:
                name = sorted(want)[step % len(want)]
                mux.remove_adapter(name)
                del want[name]
            else:
                r = int(torch.randint(1, 9, (), generator=generator))
                A, B = torch.randn(r, 6), torch.randn(5, r)
                mux.add_adapter(f"{step}", A, B, scaling=0.5)
                want[f"{step}"] = x @ mux.weight.T + 0.5 * (x @ A.T) @ B.T
            if want:
                handles = torch.tensor([[mux.adapters[name]] for name in want])
                got = mux(x.expand(len(want), 6), lora_mux.Routing(handles))
                torch.testing.assert_close(got, torch.cat(list(want.values())))

    def test_a_failed_write_leaves_nothing_behind(self, monkeypatch: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        mux = lora_mux.attach(model)
        pool: Any = model[1].mux_pool

        def out_of_memory(*arguments: object) -> None:
            raise MemoryError

        monkeypatch.setattr(pool, "write", out_of_memory)
        pair = (torch.ones(1, 4), torch.ones(4, 1))
        with pytest.raises(MemoryError):
            mux.add_adapter("a", {"0": pair, "1": pair}, alpha=1)
        assert not mux.adapters and not model[0].mux_pool.spans
        monkeypatch.undo()
        mux.add_adapter("a", {"0": pair, "1": pair}, alpha=1)
