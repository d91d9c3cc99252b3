import pytest
import torch

from runtime.gpu.memory import allocate_slab, device_memory
from runtime.linux import resident_bytes
from runtime.memory.slab import PAGE_BYTES, HostSlab
from tests.runtime.kernels.device import DEVICE

NUM_BYTES = 64 << 20
TOLERANCE = 4 << 20


@pytest.mark.parametrize("huge_pages", [False, True])
def test_released_slab_leaves_the_process(huge_pages: bool) -> None:
    slab = HostSlab(NUM_BYTES, huge_pages=huge_pages)
    view = slab.tensor.view(torch.int64)
    view.fill_(1)
    before = resident_bytes()
    slab.release()
    assert before - resident_bytes() > NUM_BYTES - TOLERANCE
    assert view.shape == (NUM_BYTES // 8,), "a view that is left over must not keep pages"


def test_untouched_slab_takes_no_memory() -> None:
    before = resident_bytes()
    slab = HostSlab(NUM_BYTES, huge_pages=False)
    assert resident_bytes() - before < TOLERANCE
    slab.release()


def test_discarded_view_gives_back_its_whole_pages_and_no_others() -> None:
    slab = HostSlab(NUM_BYTES, huge_pages=False)
    slab.tensor.fill_(7)
    before = resident_bytes()
    start, end = PAGE_BYTES // 2, 32 << 20
    assert slab.discard(slab.tensor[start:end]) == end - PAGE_BYTES
    assert before - resident_bytes() > end - TOLERANCE
    assert bool((slab.tensor[:PAGE_BYTES] == 7).all())
    assert bool((slab.tensor[PAGE_BYTES:end] == 0).all())
    assert bool((slab.tensor[end:] == 7).all())
    slab.release()


def test_view_within_one_page_is_not_discarded() -> None:
    slab = HostSlab(PAGE_BYTES, huge_pages=False)
    slab.tensor.fill_(7)
    assert slab.discard(slab.tensor[1:100]) == 0
    assert bool((slab.tensor == 7).all())
    slab.release()


def held_bytes() -> int:
    """Return what is taken where slabs are allocated: of a GPU, else of this process."""
    if DEVICE == "cpu":
        return resident_bytes()
    memory = device_memory(DEVICE)
    return memory.total_bytes - memory.free_bytes


def test_unmapped_slab_keeps_its_addresses_and_nothing_else() -> None:
    slab = allocate_slab(NUM_BYTES, DEVICE)
    view = slab.tensor.view(torch.int64)
    address = view.fill_(1).data_ptr()
    before = held_bytes()
    slab.unmap()
    assert not slab.is_mapped
    assert before - held_bytes() > NUM_BYTES - TOLERANCE
    slab.map()
    assert slab.tensor.data_ptr() == address
    assert int(view.fill_(2).sum()) == 2 * (NUM_BYTES // 8)
    slab.release()
